import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gem_ray.config import ConfigError, ExplainerConfig, load_config
from gem_ray.knowledge.explainer import Explainer, ExplainerError, ParsedAnswer, parse_answer
from gem_ray.knowledge.prompts import KnowledgeQuery, chat_messages
from gem_ray.model_check import check_models, stages_to_check
from gem_ray.stages import find_stage

HELLO = KnowledgeQuery("hello")


def ask(explainer: Explainer, query: KnowledgeQuery = HELLO) -> ParsedAnswer:
    """The answer to one query; raises its failure."""
    ((asked, answer),) = explainer.ask_all([query])
    assert asked == query
    if isinstance(answer, ExplainerError):
        raise answer
    return answer


@pytest.mark.parametrize(
    ("answer", "text", "repaired"),
    [
        ('{"explanation": "A band."}', "A band.", False),
        ('\n {"explanation": " A \\"band\\".\\n"} ', 'A "band".', False),
        ('{"explanation": null}', "", False),
        ('{"explanation": ""}', "", False),
        ("", "", False),
        ("  \n", "", False),
        ('```json\n{"explanation": "A band."}\n```', "A band.", True),
        ('Sure! {"explanation": "A band."} Anything else?', "A band.", True),
        ('{"explanation": "A band.",}', "A band.", True),
        ('{"explanation": "A band."', "A band.", True),
        ('{"explanation": "A band was cut o', "A band was cut o", True),
        ('"explanation": "A band."', "A band.", True),
        ("{'explanation': 'Simon\\'s band.'}".replace("\\'", "'"), "Simon's band.", True),
        ('{"Explanation": "A band."}', "A band.", True),
        ('{"explanation": "The "Lakers" win."}', 'The "Lakers" win.', True),
        ('{"explanation": "Two\nlines."}', "Two\nlines.", True),
        ('{"explanation": "Two\\nlines, \\u00e9t\\u00e9.",}', "Two\nlines, été.", True),
        ("It is a band.", "It is a band.", True),
        ("```\nIt is a band.\n```", "It is a band.", True),
        ('My explanation: "Queen" is a band.', 'My explanation: "Queen" is a band.', True),
        ('["a", "band"]', '["a", "band"]', True),
        ('{"explanation": {"Queen": "a band"}}', '{"explanation": {"Queen": "a band"}}', True),
    ],
)
def test_parse_answer_takes_strict_json_and_repairs_the_rest(answer, text, repaired):
    assert parse_answer(answer) == ParsedAnswer(text, repaired)


@given(st.text() | st.text(alphabet="{}[]\"\\:,`explanation \n\t'") | st.text().map(lambda t: '{"explanation": "' + t))
@example("[" * 100_000)
@example('{"explanation": ' + "9" * 5_000 + "}")
@example('{"explanation": "\\ud800"}')
def test_parse_answer_never_raises_and_gives_text_that_arrow_can_hold(answer):
    parsed = parse_answer(answer)
    parsed.text.encode("utf-8")
    assert parsed.text == parsed.text.strip()


@given(st.text())
def test_parse_answer_gives_back_any_explanation_that_was_proper_json(explanation):
    for ensure_ascii in (True, False):
        answer = json.dumps({"explanation": explanation}, ensure_ascii=ensure_ascii)
        assert parse_answer(answer) == ParsedAnswer(explanation.strip(), repaired=False)


def test_long_hostile_answers_are_parsed_in_linear_time():
    begin = time.perf_counter()
    for filler in ('" ', "{", "}", "```", '"explanation"', '"explanation": "', "\\", "\n"):
        parse_answer('{"explanation": "' + filler * 50_000 + "x")
    assert time.perf_counter() - begin < 5


def test_ask_sends_the_prompt_the_model_and_the_key(server, explainer_config, key):
    explainer = Explainer(explainer_config(model="some-llm", max_tokens=99))
    assert ask(explainer, KnowledgeQuery("hello", "a dog")) == ParsedAnswer("about hello", repaired=False)
    assert server.requests[0] == {
        "model": "some-llm",
        "messages": chat_messages(KnowledgeQuery("hello", "a dog")),
        "max_tokens": 99,
        "temperature": 0,
    }
    assert server.keys == [f"Bearer {key}"]
    assert server.paths == ["/v1/chat/completions"]


def test_the_query_of_an_address_stays_behind_its_path(server, explainer_config):
    """As Azure and gateways have it."""
    ask(Explainer(explainer_config(base_url=f"{server.url}/deployments/llm?api-version=2024-06-01")))
    assert server.paths == ["/v1/deployments/llm/chat/completions?api-version=2024-06-01"]


def test_models_that_take_other_parameters_and_another_header_are_asked(server, explainer_config, key):
    """As OpenAI's reasoning models and Azure want them."""
    config = explainer_config(api_key_header="api-key", max_tokens_name="max_completion_tokens", temperature=None)
    ask(Explainer(config))
    assert set(server.requests[0]) == {"model", "messages", "max_completion_tokens"}
    assert (server.keys, server.key_headers) == ([None], [key])


@pytest.mark.parametrize(
    ("status", "said", "remedy"),
    [
        (401, "Incorrect API key provided", r"; the key is that of \$TEST_KEY, sent as Authorization$"),
        (
            400,
            "'max_tokens' is not supported. Use 'max_completion_tokens'",
            "; set max_tokens_name to max_completion_tokens$",
        ),
        (400, "Unsupported value: 'temperature' does not support 0", "; set temperature to null$"),
        (404, "The model `gpt` does not exist", "does not exist$"),
    ],
)
def test_a_refusal_is_found_before_the_first_post_and_says_what_to_set(
    server, explainer_config, reply, status, said, remedy
):
    body = json.dumps({"error": {"message": said}}).encode()
    server.script = lambda text, n: reply(status=status, body=body)
    config = load_config(knowledge={"explainer": explainer_config(), "cache": "somewhere"})
    stages = stages_to_check(config)
    assert "knowledge" in [spec.name for spec in stages]
    with pytest.raises(ValueError, match=rf"^knowledge\.explainer: .* HTTP {status} .*{remedy}"):
        check_models([find_stage("knowledge")], config)
    assert len(server.requests) == 1


def test_an_endpoint_that_is_gone_ends_a_run_that_has_no_answers_of_earlier_ones(server, explainer_config):
    check_models([find_stage("knowledge")], load_config(knowledge={"explainer": explainer_config()}))
    server.server_close()
    settings = explainer_config(retries=0)
    with pytest.raises(ValueError, match=r"knowledge\.explainer: .*ConnectError"):
        check_models([find_stage("knowledge")], load_config(knowledge={"explainer": settings}))
    check_models([find_stage("knowledge")], load_config(knowledge={"explainer": settings, "cache": "somewhere"}))


def test_no_key_in_the_environment_sends_none(server, explainer_config):
    ask(Explainer(explainer_config(api_key_env="NOT_SET_ANYWHERE")))
    assert server.keys == [None]


@pytest.mark.parametrize("fault", ["429", "500", "503", "hangs", "drips", "hangs_up"])
def test_a_passing_fault_is_asked_again(server, explainer_config, reply, fault):
    faults = {
        "429": reply(status=429),
        "500": reply(status=500, body=b"<html>oops</html>"),
        "503": reply(status=503),
        "hangs": reply(delay_s=3),
        "drips": reply(drip_s=0.1),  # every byte comes in time, the reply never does
        "hangs_up": reply(hang_up=True),
    }
    server.script = lambda text, n: faults[fault] if n == 0 else reply()
    explainer = Explainer(explainer_config(timeout_s=1.5 if fault in ("hangs", "drips") else 30))
    assert ask(explainer) == ParsedAnswer("fine", repaired=False)
    assert len(server.asked["hello"]) == 2


def test_a_lasting_fault_is_given_up_after_the_configured_retries(server, explainer_config, reply):
    server.script = lambda text, n: reply(status=500)
    with pytest.raises(ExplainerError, match="3 tries; the last: HTTP 500"):
        ask(Explainer(explainer_config(retries=2)))
    assert len(server.asked["hello"]) == 3


def test_nobody_listening_is_a_failure_not_a_crash(server, explainer_config):
    config = explainer_config(retries=1)
    server.server_close()
    with pytest.raises(ExplainerError, match="ConnectError"):
        ask(Explainer(config))


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_a_refusal_is_not_asked_again(server, explainer_config, reply, status):
    body = json.dumps({"error": {"message": "no such model"}}).encode()
    server.script = lambda text, n: reply(status=status, body=body, headers={"Location": "/elsewhere"})
    with pytest.raises(ExplainerError, match=f"HTTP {status} no such model"):
        ask(Explainer(explainer_config()))
    assert len(server.asked["hello"]) == 1


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b"{}", b'{"choices": []}', b"[" * 100_000, b"\xff", b" " * (2**20 + 1)]
)
def test_a_reply_that_is_no_chat_completion_is_a_failure(server, explainer_config, reply, body):
    server.script = lambda text, n: reply(body=body)
    with pytest.raises(ExplainerError, match="reply is"):
        ask(Explainer(explainer_config()))


@pytest.mark.parametrize("thoughts", ["<think>{hm}</think>", "{hm}\n</think>\n\n", "<think>\n\n</think>"])
def test_what_a_reasoning_model_thinks_is_not_its_answer(server, explainer_config, reply, thoughts):
    server.script = lambda text, n: reply(content=thoughts + '{"explanation": "A band."}')
    assert ask(Explainer(explainer_config())).text == "A band."


@pytest.mark.parametrize("content", [None, "", "<think>The user asks"])
def test_a_reasoning_model_that_is_cut_off_has_not_answered(server, explainer_config, reply, content):
    """No answer is kept as what the model knows: it knows nothing about the post."""
    choice = {"message": {"content": content}, "finish_reason": "length"}
    server.script = lambda text, n: reply(body=json.dumps({"choices": [choice]}).encode())
    with pytest.raises(ExplainerError, match=r"after max_tokens \(77\)"):
        ask(Explainer(explainer_config(max_tokens=77)))


@pytest.mark.parametrize(
    "body", [{"error": "model 'x' not found"}, {"detail": "model 'x' not found"}, {"message": "model 'x' not found"}]
)
@pytest.mark.parametrize("status", [200, 404])
def test_what_other_servers_say_of_a_refusal_is_passed_on(server, explainer_config, reply, body, status):
    server.script = lambda text, n: reply(status=status, body=json.dumps(body).encode())
    with pytest.raises(ExplainerError, match="model 'x' not found"):
        ask(Explainer(explainer_config()))


def test_a_reply_without_content_is_an_empty_answer(server, explainer_config, reply):
    server.script = lambda text, n: reply(content=None)
    assert ask(Explainer(explainer_config())) == ParsedAnswer("", repaired=False)


def test_retry_after_in_seconds_is_waited_for(server, explainer_config, reply):
    server.script = lambda text, n: reply(status=429, headers={"Retry-After": "1"}) if n == 0 else reply()
    ask(Explainer(explainer_config(max_pause_s=5)))
    first, second = server.asked["hello"]
    assert 1 <= second - first < 5


def test_retry_after_as_a_date_is_waited_for(server, explainer_config, reply):
    date = formatdate(time.time() + 3, usegmt=True)  # whole seconds: at least two from now
    server.script = lambda text, n: reply(status=503, headers={"Retry-After": date}) if n == 0 else reply()
    ask(Explainer(explainer_config(max_pause_s=5)))
    first, second = server.asked["hello"]
    assert 1.5 <= second - first < 5


@pytest.mark.parametrize("value", ["86400", "9" * 400, "tomorrow", "-1", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_retry_after_is_capped_and_nonsense_is_ignored(server, explainer_config, reply, value):
    server.script = lambda text, n: reply(status=429, headers={"Retry-After": value}) if n == 0 else reply()
    ask(Explainer(explainer_config(max_pause_s=0.1)))
    first, second = server.asked["hello"]
    assert second - first < 10


def test_pauses_grow_until_they_reach_the_cap(server, explainer_config, reply, monkeypatch):
    pauses = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=pauses.append)
    monkeypatch.setattr("gem_ray.chat.time", clock)
    server.script = lambda text, n: reply(hang_up=True)
    with pytest.raises(ExplainerError):
        ask(Explainer(explainer_config(retries=6, max_pause_s=10)))
    assert len(pauses) == 6  # none after the last try
    for attempt, pause in enumerate(pauses):
        assert min(0.25 * 2**attempt, 10) <= pause <= min(0.5 * 2**attempt, 10)


def test_no_more_questions_at_once_than_configured(server, explainer_config, reply):
    server.script = lambda text, n: reply(delay_s=0.05)
    queries = [KnowledgeQuery(f"post {i}") for i in range(20)]
    answers = dict(Explainer(explainer_config(concurrency=4)).ask_all(queries))
    assert set(answers) == set(queries)
    assert 4 <= server.most_running <= 5  # the server may still close one when the client sends the next


def test_no_more_tries_in_a_time_than_configured(server, explainer_config, reply):
    """Evenly spaced, retries too: twenty a second are one every 50 ms, however many threads ask."""
    server.script = lambda text, n: reply(status=503) if n == 0 else reply()
    explainer = Explainer(explainer_config(concurrency=8, requests_per_minute=1200, max_pause_s=0))
    answers = dict(explainer.ask_all([KnowledgeQuery(f"post {i}") for i in range(6)]))
    assert all(isinstance(answer, ParsedAnswer) for answer in answers.values())
    times = sorted(time for times in server.asked.values() for time in times)
    assert len(times) == 12
    assert times[-1] - times[0] > 0.9 * 11 * 0.05


def test_retry_after_holds_for_every_thread(server, explainer_config, reply):
    """The endpoint means the client, which must not go on asking from its other threads."""
    server.script = lambda text, n: (
        reply(status=429, headers={"Retry-After": "1"}) if text == "first" and n == 0 else reply()
    )
    explainer = Explainer(explainer_config(concurrency=1, max_pause_s=5))
    others = Explainer(explainer_config(concurrency=4))
    others._client._pace = explainer._client._pace
    answers = explainer.ask_all([KnowledgeQuery("first")])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, answers)
        while not server.asked["first"]:
            time.sleep(0.01)
        time.sleep(0.2)
        list(others.ask_all([KnowledgeQuery(f"post {i}") for i in range(4)]))
        first.result()
    refused = server.asked["first"][0]
    assert all(moment - refused > 0.9 for text, times in server.asked.items() if text != "first" for moment in times)


def test_one_failed_query_leaves_the_others_their_answers(server, explainer_config, reply):
    server.script = lambda text, n: reply(status=400) if text == "post 3" else reply(f'{{"explanation": "{text}"}}')
    answers = dict(Explainer(explainer_config()).ask_all([KnowledgeQuery(f"post {i}") for i in range(8)]))
    failed = answers.pop(KnowledgeQuery("post 3"))
    assert isinstance(failed, ExplainerError)
    assert answers == {KnowledgeQuery(f"post {i}"): ParsedAnswer(f"post {i}", False) for i in range(8) if i != 3}


def test_answers_come_as_soon_as_they_are_there(server, explainer_config, reply):
    server.script = lambda text, n: reply(delay_s=0.5 if text == "slow" else 0)
    order = [
        query.text
        for query, _ in Explainer(explainer_config()).ask_all([KnowledgeQuery("slow"), KnowledgeQuery("quick")])
    ]
    assert order == ["quick", "slow"]


def test_leaving_early_drops_the_questions_that_wait(server, explainer_config, reply):
    server.script = lambda text, n: reply(delay_s=0.05)
    explainer = Explainer(explainer_config(concurrency=1))
    answers = explainer.ask_all([KnowledgeQuery(f"post {i}") for i in range(20)])
    next(answers)
    answers.close()
    explainer.close()
    assert len(server.requests) <= 3


def test_the_key_is_in_no_log_error_or_repr(server, explainer_config, reply, key, caplog):
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode()
    statuses = {"busy": 500, "refused": 401}
    server.script = lambda text, n: reply(status=statuses[text], body=body) if text in statuses else reply()
    config = explainer_config(retries=1)
    explainer = Explainer(config)
    with caplog.at_level(logging.DEBUG):
        answers = dict(explainer.ask_all([KnowledgeQuery("fine"), KnowledgeQuery("busy"), KnowledgeQuery("refused")]))
    seen = [caplog.text, repr(explainer), repr(config), *map(repr, answers.values())]
    errors = [answer for answer in answers.values() if isinstance(answer, ExplainerError)]
    assert len(errors) == 2
    for error in errors:
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None
    assert "POST" in caplog.text  # something was logged
    assert key not in "".join(seen)


@pytest.mark.parametrize("bad", ["sk-sécret", "sk-two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(explainer_config, monkeypatch, bad):
    monkeypatch.setenv("TEST_KEY", bad)
    with pytest.raises(ConfigError, match="TEST_KEY") as caught:
        Explainer(explainer_config())
    assert bad not in str(caught.value)


def test_an_address_that_is_no_http_url_is_refused():
    with pytest.raises(ValueError, match="base_url"):
        ExplainerConfig(base_url="127.0.0.1:8000/v1")
