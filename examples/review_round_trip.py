"""Draw posts of a run, have them checked, and certify the run. The checker here accepts every prediction.

python examples/review_round_trip.py out/ posts/ review/
"""

import json
import sys
from pathlib import Path

from gem_ray import read_posts
from gem_ray.review.certificate import Claim, certify, write_certificate
from gem_ray.review.corrections import read_corrections
from gem_ray.review.folder import read_review
from gem_ray.review.gold import write_gold
from gem_ray.review.page import print_certificate
from gem_ray.review.sample import sample_for_certificate

run, posts, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sample_for_certificate(run, folder, posts=30, images=posts)

# In place of people at Label Studio, whose JSON export has the tasks with `annotations` like this.
tasks = json.loads((folder / "tasks.json").read_text())
for task in tasks:
    task["annotations"] = [{"result": prediction["result"]} for prediction in task["predictions"]]
(folder / "export.json").write_text(json.dumps(tasks))

review = read_review(folder)
corrections = read_corrections(folder / "export.json", review)
certificate = certify(review, corrections, claims=[Claim.parse("mner.f1>=0.5")])
print_certificate(certificate)
write_certificate(certificate, folder / "certificate")

gold = folder / "gold"  # shards to train, evaluate and calibrate on
write_gold(review, corrections, str(gold), posts)
learned = list(read_posts(gold))
print(f"{len(learned)} posts with {sum(len(post.gold or ()) for post in learned)} gold mentions")
