"""Keys and tokens are blanked out of what rewards say, whoever says it and however."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest
from flowrl.rewards.endpoint import Endpoint, EndpointError

from flowrl.scoring.executors import ExecutorSettings, make_executor
from flowrl.scoring.redact import hide

from .executor_tools import Answer, batch, entry, reply, scripted_server
from .test_executors_http import opened

CANARY = "c4n4ry-Secret-77"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "openai_key", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "X_AUTH"]
)
def test_values_of_secret_variables_are_blanked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, CANARY)
    assert hide(f"401 for Bearer {CANARY}, again {CANARY.upper()}.") == "401 for Bearer ***, again ***."


def test_plain_variables_and_short_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_NAME", CANARY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a long enough value")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert hide(f"{CANARY} a long enough value short") == f"{CANARY} a long enough value short"
    assert hide("the short one", "short") == "the *** one"


def test_a_secret_within_another_leaves_nothing_of_the_longer_one() -> None:
    assert hide("abcdef12 and abcdef12-tail", "abcdef12", "abcdef12-tail") == "*** and ***"


def test_what_a_reward_raises_and_tells_is_blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    for kind in ("inline", "thread", "process"):
        with make_executor("spills", entry("spills"), ExecutorSettings(kind=kind)) as executor:  # type: ignore[arg-type]
            told, raised = executor.score(batch(1)), executor.score(batch(1, prompt="raise"))
        assert told.valid.all() and not raised.valid.any()
        assert list(told.details) == ["note: key ***"] and "***" in str(raised.errors[0])
        assert CANARY not in repr((told, raised))


def at_the_cut(connection: Any) -> None:
    """An error text that is cut in the middle of the token."""
    reply(500, json.dumps({"error": "x" * 292 + CANARY}).encode())(connection)


def escaped(connection: Any) -> None:
    """The token in JSON's own spelling, letter by letter."""
    letters = "".join(f"\\u{ord(letter):04x}" for letter in CANARY)
    reply(500, f'{{"error": "{letters}"}}'.encode())(connection)


@pytest.mark.parametrize("answer", [at_the_cut, escaped])
def test_half_a_token_is_a_secret_too(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER", CANARY)
    with ExitStack() as stack:
        executor, seen = opened(stack, answer, token_env="SCORER")
        result = executor.score(batch(1, 2))
    assert CANARY.encode() in seen[1]
    assert CANARY[:4] not in repr(result) and "the service answers 500" in str(result.errors[0])


def chat(text: str) -> Answer:
    return reply(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def test_a_judge_that_says_its_key_back_is_blanked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", CANARY)
    with scripted_server([chat(f"I was sent {CANARY}"), reply(200, b"[]"), reply(403, CANARY.encode())]) as (url, seen):
        endpoint = Endpoint(f"{url}/v1", "m", key_variable="JUDGE", retries=0)
        assert endpoint.chat("?", []).text == "I was sent ***"
        for _ in range(2):
            with pytest.raises(EndpointError) as caught:
                endpoint.chat("?", [])
            assert CANARY not in str(caught.value)
    assert all(CANARY.encode() in request for request in seen)
