"""The proxy between clients and a stand-in for an engine."""

import http.client
import json

import pytest
from engines import WORDS, Engine, running

from moe_rewrite.errors import ConfigError, InputError
from moe_rewrite.serve.proxy import CHOSEN, Proxy


class Router:
    """Chooses by a word of the prompt."""

    names, base = ["law", "tales"], "llama"

    def weights(self, prompt):
        text = json.dumps(prompt)
        if "unreadable" in text:
            raise InputError("messages: the tokenizer has no chat template; send a prompt")
        law, tales = 0.8 * ("court" in text), 0.7 * ("dragon" in text)
        return {"base": 1 - max(law, tales), "law": law, "tales": tales}


@pytest.fixture
def engine():
    with running(Engine()) as made:
        yield made


@pytest.fixture
def proxy(engine):
    with running(Proxy(Router(), engine.url, port=0)) as made:
        yield made


def ask(proxy, body, path="/v1/completions", method="POST", **headers):
    """(status, what was said, headers) of an answer."""
    client = http.client.HTTPConnection(*proxy.server_address, timeout=30)
    client.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
    answer = client.getresponse()
    said = json.loads(answer.read())
    client.close()
    return answer.status, said, answer.headers


@pytest.mark.parametrize(
    ("prompt", "model"), [("a dragon", "tales"), ("in court", "law"), ("2 + 2", "llama")]
)
def test_a_prompt_is_forwarded_to_its_adapter(engine, proxy, prompt, model):
    body = {"model": "moe", "prompt": prompt, "temperature": 0.5, "logit_bias": {"3": 1}}
    status, said, headers = ask(proxy, body, Authorization="Bearer key")
    assert (status, said["model"]) == (200, model)
    assert said["choices"][0]["text"] == " ".join(WORDS)
    assert headers[CHOSEN] == ("base" if model == "llama" else model)
    assert engine.asked == [("/v1/completions", body | {"model": model})]
    assert engine.headers[0]["Authorization"] == "Bearer key"


def test_a_chat_is_forwarded_and_other_forms_of_a_prompt(engine, proxy):
    chat = {"model": "moe", "messages": [{"role": "user", "content": "a dragon"}]}
    assert ask(proxy, chat, "/v1/chat/completions")[1]["model"] == "tales"
    assert engine.asked[-1] == ("/v1/chat/completions", chat | {"model": "tales"})
    for prompt in (["a dragon"], "a dragon"):
        assert ask(proxy, {"prompt": prompt})[1]["model"] == "tales"
    assert ask(proxy, {"prompt": [3, 4, 5]})[1]["model"] == "llama"


def test_a_client_may_choose_for_itself(engine, proxy):
    for model, at_engine in (("law", "law"), ("llama", "llama"), ("base", "llama")):
        assert ask(proxy, {"model": model, "prompt": "a dragon"})[1]["model"] == at_engine
    status, said, _ = ask(proxy, {"model": "chess", "prompt": "a dragon"})
    assert status == 404 and "'chess': expected one of moe, llama, law, tales" in str(said)
    assert len(engine.asked) == 3
    listed = ask(proxy, "", "/v1/models", "GET")[1]["data"]
    assert [m["id"] for m in listed] == ["moe", "llama", "law", "tales"]


def test_a_mixture_is_forwarded_as_scales(engine):
    made = Proxy(Router(), engine.url, "llama.cpp", mixture=True, port=0)
    with running(made) as proxy:
        ask(proxy, {"prompt": "a dragon in court"})
    assert engine.asked[0][1]["lora"] == [{"id": 0, "scale": 0.8}, {"id": 1, "scale": 0.7}]
    with running(Proxy(Router(), engine.url, "llama.cpp", port=0)) as proxy:
        ask(proxy, {"prompt": "a dragon in court"})
    assert engine.asked[1][1]["lora"] == [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}]


def stream(proxy, **more):
    client = http.client.HTTPConnection(*proxy.server_address, timeout=30)
    body = {"prompt": "a dragon", "stream": True, **more}
    client.request("POST", "/v1/completions", json.dumps(body))
    return client, client.getresponse()


def test_a_stream_is_passed_on_as_it_comes(engine, proxy):
    client, answer = stream(proxy)
    assert answer.getheader("Content-Type") == "text/event-stream"
    assert answer.readline() == b"data: once\n"  # while the engine waits for us
    engine.go_on.set()
    assert answer.read() == b"\n" + b"".join(f"data: {w}\n\n".encode() for w in WORDS[1:])
    client.close()


def test_a_stream_that_the_engine_cuts_has_no_end(engine, proxy):
    engine.go_on.set()
    client, answer = stream(proxy, cut=True)
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    client.close()


def test_errors_of_the_engine_are_passed_on(engine, proxy):
    status, said, headers = ask(proxy, {"prompt": "a dragon", "max_tokens": -1})
    assert status == 400 and said == {"error": {"message": "max_tokens must be positive"}}
    assert headers[CHOSEN] == "tales"


def test_an_engine_that_is_down_is_a_502(engine):
    gone = Engine()
    gone.server_close()
    with running(Proxy(Router(), gone.url, port=0)) as proxy:
        status, said, _ = ask(proxy, {"prompt": "a dragon"})
    assert status == 502 and f"the engine at {gone.url} does not answer" in said["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "prompt: expected a text"),
        ({"prompt": ""}, 400, "prompt: expected a text"),
        ({"prompt": 7}, 400, "prompt: expected a text"),
        ({"prompt": ["a", "b"]}, 400, "2 prompts"),
        ({"prompt": "unreadable"}, 400, "no chat template"),
        ({"prompt": "a", "model": 3}, 404, "model 3"),
        ([1], 400, "expected a JSON object"),
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
    ],
)
def test_what_is_no_request_is_refused(engine, proxy, body, status, words):
    got, said, _ = ask(proxy, body)
    assert got == status and words in said["error"]["message"]
    assert said["error"]["code"] == status and engine.asked == []


def test_a_chat_without_messages_and_another_path_are_refused(engine, proxy):
    for messages in (None, [], ["hello"]):
        got, said, _ = ask(proxy, {"messages": messages}, "/v1/chat/completions")
        assert got == 400 and "messages: expected" in said["error"]["message"]
    assert ask(proxy, {"input": "a"}, "/v1/embeddings")[0] == 404
    assert ask(proxy, "", "/metrics", "GET")[0] == 404
    assert engine.asked == []


def test_options_that_do_not_fit_are_refused(engine):
    for words, url, options in (
        ("url='localhost:8000': expected", "localhost:8000", {}),
        ("engine='tgi'", engine.url, {"engine": "tgi"}),
        ("one adapter a request", engine.url, {"mixture": True}),
        ("name='law'", engine.url, {"name": "law"}),
    ):
        with pytest.raises(ConfigError, match=words):
            Proxy(Router(), url, port=0, **options)
