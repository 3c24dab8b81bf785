"""Ask a running service (`gem-ray serve`): one post, a batch, and a stream of answers as they are done.

python examples/client.py posts/ http://127.0.0.1:8000
"""

import sys

from gem_ray import Client, ClientError, read_posts

folder, url = sys.argv[1:]
posts = [{"text": post.text, "image": post.image_bytes} for post in read_posts(folder, limit=8)]
with Client(url) as client:
    one = client.annotate("Taylor Swift sings in Paris")
    print(one.status, [(entity.text, entity.fine) for entity in one.entities], one.models)

    for annotation in client.annotate_batch(posts):
        print(annotation.status, [(entity.text, entity.box) for entity in annotation.entities])

    for place, answer in client.stream(posts):  # in the order in which they are done
        print(place, answer if isinstance(answer, ClientError) else f"{answer.seconds['waiting']:.3f} s waited")
