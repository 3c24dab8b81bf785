"""The prompt that asks a language model for auxiliary knowledge about a post (§3.2.1, Table 6)."""

from __future__ import annotations

import json
from dataclasses import dataclass

# Part of the cache's key: change it with every change of the messages below.
PROMPT_VERSION = "table6-2"

# What the model is asked to answer with: `{"explanation": "…"}`.
ANSWER_FIELD = "explanation"


@dataclass(frozen=True)
class KnowledgeQuery:
    """What is asked about: a post's text, and its image's caption if there is one."""

    text: str
    caption: str | None = None


# Table 6: the three worked examples. The full stop at the end of a text is the text's own: the third has none.
EXAMPLES: tuple[tuple[KnowledgeQuery, str], ...] = (
    (
        KnowledgeQuery(
            "Details on our newly announced Federation Business Data Lake Solution :.",
            "a screen shot of the federation business data lake 10",
        ),
        "The tweet is announcing a new solution called Federation Business Data Lake. The solution is likely designed "
        "to help businesses store and manage their data in a central repository, known as a data lake. A data lake is "
        "a large storage system that allows for the collection, storage, and analysis of large amounts of structured "
        "and unstructured data from various sources.",
    ),
    (
        KnowledgeQuery(
            "i gotta feeling by the black eyed peas blocked you belong with me by taylor swift.",
            "a screenshot of the youtube app showing the different videos",
        ),
        "The tweet is referencing the songs 'I Gotta Feeling' by The Black Eyed Peas and 'You Belong With Me' by "
        "Taylor Swift being blocked on YouTube. 'I Gotta Feeling' is a popular dance-pop song released in 2009, while "
        "'You Belong With Me' is a country-pop song released in 2008. The tweet suggests that the user may have tried "
        "to access these songs on YouTube but found that they were blocked.",
    ),
    (
        KnowledgeQuery(
            "Leonardo DiCaprio and Kate Moss on their way to an art show in New York City(1993)",
            "a man and woman standing in the middle of a city street",
        ),
        "The tweet is referencing a photograph of Leonardo DiCaprio and Kate Moss attending an art show in New York "
        "City in 1993. Leonardo DiCaprio and Kate Moss are both well-known actors and models. In the image, a man and "
        "woman (presumably Leonardo DiCaprio and Kate Moss) are seen standing in the middle of a city street, likely "
        "on their way to the art show. The tweet is highlighting a moment from their past where they attended a "
        "cultural event together.",
    ),
)


def query_text(query: KnowledgeQuery) -> str:
    """Table 6's question about a post; without the sentence about the caption where there is none."""
    caption = f" Accordingly, it is corresponding caption: {query.caption}." if query.caption else ""
    return (
        f"Here's a tweet content: {query.text}{caption} Please explain the tweet and especially some of the words in "
        f'it according to your knowledge and answer in the format of json like: "{ANSWER_FIELD}": ""'
    )


def answer_text(explanation: str) -> str:
    """An answer in the form that is asked for."""
    return json.dumps({ANSWER_FIELD: explanation}, ensure_ascii=False)


def chat_messages(query: KnowledgeQuery) -> list[dict[str, str]]:
    """The worked examples as turns of a conversation, then the question.

    Table 6 prints the examples' answers bare; here they are the JSON that the question asks for, so that the examples
    do not teach another form.
    """
    messages: list[dict[str, str]] = []
    for example, explanation in EXAMPLES:
        messages.append({"role": "user", "content": query_text(example)})
        messages.append({"role": "assistant", "content": answer_text(explanation)})
    return [*messages, {"role": "user", "content": query_text(query)}]
