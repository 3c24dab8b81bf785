import hashlib
import json
import re
from pathlib import Path

import pytest

from gem_ray.knowledge.prompts import EXAMPLES, PROMPT_VERSION, KnowledgeQuery, chat_messages, query_text

PAPER = Path(__file__).parents[2].parent / "shared" / "paper" / "gem.txt"


def test_query_is_the_sentence_of_table_6():
    assert query_text(KnowledgeQuery("taylor swift sings", "a stage")) == (
        "Here's a tweet content: taylor swift sings Accordingly, it is corresponding caption: a stage. Please explain "
        "the tweet and especially some of the words in it according to your knowledge and answer in the format of json "
        'like: "explanation": ""'
    )


def test_query_without_caption_says_nothing_about_a_caption():
    assert "caption" not in query_text(KnowledgeQuery("taylor swift sings"))


def test_messages_are_three_examples_in_turns_and_then_the_question():
    query = KnowledgeQuery("a text", "a caption")
    messages = chat_messages(query)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 + ["user"]
    assert messages[-1]["content"] == query_text(query)
    for message in messages[1::2]:
        assert list(json.loads(message["content"])) == ["explanation"]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not in ../shared")
def test_examples_are_the_papers_to_the_letter():
    table = PAPER.read_text(encoding="utf-8").partition("I Prompt template")[2].partition("Table 6: Templates")[0]
    queries = re.findall(r"Query:\n\n(.*?)\n", table)
    answers = re.findall(r"Answer:\n\n(.*?)\n", table)
    assert [query_text(query) for query, _ in EXAMPLES] == queries
    assert [explanation for _, explanation in EXAMPLES] == answers


def test_prompt_version_changes_with_the_prompt():
    """Otherwise the cache would give answers to questions that were never asked."""
    digest = hashlib.sha256(json.dumps(chat_messages(KnowledgeQuery("text", "caption"))).encode()).hexdigest()[:12]
    assert (PROMPT_VERSION, digest) == ("table6-2", "7094ac4f77c1")
