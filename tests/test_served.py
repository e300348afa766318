"""generate.served and generate.cache against servers that fail, processes that die, and a real server."""

import base64
import contextlib
import email.utils
import http.server
import itertools
import json
import logging
import os
import pickle
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from urllib.parse import quote

import pytest

from alignkit.generate import served
from alignkit.generate.cache import Cache, CacheError, call_key
from alignkit.generate.served import BatchFailed, CallFailed, Served, parse_completion
from alignkit.generate.text import Completion, NotAble, Request, image_part


def answer(text="[[A]]", **more):
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3}} | more


def ask(text, **more):
    return Request([{"role": "user", "content": text}], max_new_tokens=5, **more)


class Fault:
    "What a server does with one request: sends these bytes, one `pause` apart, and hangs up."

    def __init__(self, body=b"", status=200, headers=(), pause=0.0, length=None, raw=None, hold=0.0):
        self.body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.status, self.headers, self.pause = status, dict(headers), pause
        self.length, self.raw, self.hold = length, raw, hold  # hold: silent for so long, first


class Faulty(http.server.ThreadingHTTPServer):
    "Answers each request with the next fault of its script, and then well; counts all."

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, faults=(), work=0.0, port=0, answers=lambda body: answer()):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.work, self.answers = iter(faults), work, answers
        self.lock, self.bodies, self.headers = threading.Lock(), [], []
        self.now = self.most = 0  # requests at work
        self.sockets, self.down = set(), threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients hang up at their deadline

    def die(self):
        "As a killed process does: the port closes, and what is in flight breaks off."
        self.down.set()
        self.shutdown()
        self.server_close()
        for each in list(self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open, unless a fault breaks one

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.sockets.add(self.connection)
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            self.server.bodies.append(body)
            self.server.headers.append(self.headers)
            fault = next(self.server.faults, None)
        self.close_connection = fault is not None
        self.server.down.wait(self.server.work)
        self.answer_as(fault or Fault(self.server.answers(body)))
        with self.server.lock:
            self.server.now -= 1

    def answer_as(self, fault):
        self.server.down.wait(fault.hold)
        if fault.raw is not None:
            self.wfile.write(fault.raw)
            return
        self.send_response(fault.status)
        for name, value in fault.headers.items():
            self.send_header(name, value)
        if fault.length != "none":
            self.send_header("Content-Length", str(fault.length or len(fault.body)))
        self.end_headers()
        for byte in ([fault.body] if not fault.pause else (fault.body[i:i + 1]
                                                           for i in range(len(fault.body)))):
            self.wfile.write(byte)
            self.wfile.flush()
            if self.server.down.wait(fault.pause):
                return


@pytest.fixture
def cache(tmp_path):
    made = Cache(tmp_path / "calls.sqlite")
    yield made
    made.close()


@pytest.fixture
def serve():
    made = []

    def start(*args, **options):
        made.append(Faulty(*args, **options))
        return made[-1]

    yield start
    for server in made:
        if not server.down.is_set():
            server.die()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "Retries after hundredths of a second; their logic is the same."
    import tenacity

    jitter = tenacity.wait_random_exponential(multiplier=0.01, max=0.05)
    monkeypatch.setattr(served, "_patience",
                        lambda: lambda state: state.outcome.exception().wait + jitter(state))


# ---- every fault ends in an answer, or in an error that says what happened -------------


GOOD = json.dumps(answer()).encode()
HTTP = b"HTTP/1.1 200 OK\r\n"
PASSING = {
    "429": Fault(b"slow down", 429),
    "429 with Retry-After": Fault(b"slow down", 429, {"Retry-After": "0.2"}),
    "429 with a date": Fault(b"slow down", 429, {"Retry-After": email.utils.formatdate(0)}),
    "429 with nonsense": Fault(b"slow down", 429, {"Retry-After": "soon, nan, -1"}),
    "408": Fault(b"", 408), "409": Fault(b"", 409),
    "500": Fault(b"oops", 500), "502": Fault(b"<html>bad gateway</html>", 502), "503": Fault(b"", 503),
    "529": Fault(b"overloaded", 529),
    "hangs up at once": Fault(raw=b""),
    "no HTTP": Fault(raw=b"\x00\x01\x02 what?\r\n\r\n"),
    "half a status line": Fault(raw=b"HTTP/1."),
    "fewer bytes than promised": Fault(GOOD[:50], length=len(GOOD)),
    "a broken chunk": Fault(raw=HTTP + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "no gzip": Fault(GOOD, headers={"Content-Encoding": "gzip"}),
    "truncated JSON": Fault(GOOD[:-9]),
    "nothing": Fault(b""),
    "HTML": Fault(b"<html>It works!</html>", headers={"Content-Type": "text/html"}),
    "a list": Fault(b"[1, 2]"), "null": Fault(b"null"), "deep": Fault(b"[" * 100_000),
    "no choices": Fault(answer(choices=[])), "choices: zzz": Fault(answer(choices="zzz")),
    "two choices": Fault(answer(choices=[{}, {}])), "a number": Fault(answer(choices=[7])),
    "content null": Fault(answer(None)), "content 5": Fault(answer(5)),
    "message null": Fault(answer(choices=[{"message": None, "finish_reason": "stop"}])),
    "no finish": Fault(answer(choices=[{"message": {"content": ""}}])),
    "usage null": Fault(answer(usage=None)), "usage NaN": Fault(GOOD.replace(b"7", b"NaN")),
    "usage -1": Fault(GOOD.replace(b"7", b"-1")), "usage text": Fault(GOOD.replace(b"7", b'"7"')),
    "error with 200": Fault({"error": {"message": "out of memory"}}),
}
LASTING = {name: fault for name, fault in PASSING.items() if "date" not in name} | {
    "redirect to itself": Fault(b"", 307, {"Location": "/v1/chat/completions"})}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_passing_fault_ends_in_the_answer(serve, cache, fault):
    server = serve([fault])
    judge = Served(server.url, "judge", cache, deadline=5)
    assert judge.generate([ask("?")]) == [Completion("[[A]]", "stop", 7, 3)]
    assert len(server.bodies) == 2 and judge.usage.retries == 1  # nobody else tries again


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_ends_in_an_error_within_the_deadline(serve, cache, name):
    server = serve(itertools.repeat(LASTING[name]))
    start = time.monotonic()
    with pytest.raises(BatchFailed, match="1 of 1 calls failed") as raised:
        Served(server.url, "judge", cache, deadline=0.4).generate([ask("?")])
    assert time.monotonic() - start < 0.4 + 0.5
    [failure] = raised.value.results
    assert failure.server_at_fault and server.url in str(failure)
    assert cache.totals() == {}
    if name.partition(" ")[0].isdigit():
        assert f"status {name[:3]}" in str(failure)


SLOW = {
    "silence": Fault(GOOD, hold=60),
    "a trickle": Fault(GOOD, pause=0.05),
    "a trickle of headers": Fault(raw=HTTP + b"X: y\r\n", hold=0.2),
    "no end": Fault(b" " * 10_000, pause=0.01, length="none"),
}


@pytest.mark.parametrize("fault", SLOW.values(), ids=SLOW)
def test_slowness_ends_at_the_deadline_whatever_arrives_meanwhile(serve, cache, fault):
    server = serve(itertools.repeat(fault))
    start = time.monotonic()
    with pytest.raises(BatchFailed, match=r"of at most 1 s"):
        Served(server.url, "judge", cache, deadline=1.0).generate([ask("?")])
    assert time.monotonic() - start < 1.5


def test_no_server_at_all(cache):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
        with pytest.raises(BatchFailed, match="ConnectError"):
            Served(url, "judge", cache, deadline=0.3).generate([ask("?")])


def test_retry_after_is_obeyed_or_the_call_ends(serve, cache):
    server = serve([Fault(b"", 429, {"Retry-After": "0.5"})])
    start = time.monotonic()
    Served(server.url, "judge", cache, deadline=5).generate([ask("?")])
    assert 0.5 <= time.monotonic() - start < 1.5
    server = serve([Fault(b"come back tomorrow", 429, {"Retry-After": "86400"})])
    start = time.monotonic()
    with pytest.raises(BatchFailed, match="come back tomorrow"):
        Served(server.url, "judge", cache, deadline=5).generate([ask("?")])
    assert time.monotonic() - start < 1  # rather than wait in vain


@pytest.mark.parametrize("status, at_fault", [(400, False), (413, False), (422, False), (401, True),
                                              (403, True), (404, True)])
def test_a_lasting_status_is_not_tried_again(serve, cache, status, at_fault):
    server = serve(itertools.repeat(Fault(b"never", status)))
    with pytest.raises(BatchFailed, match=f"status {status}: 'never'") as raised:
        Served(server.url, "judge", cache).generate([ask("?")])
    assert raised.value.results[0].server_at_fault is at_fault
    assert len(server.bodies) == 1


def test_an_exhausted_account_is_not_tried_again(serve, cache):
    server = serve(itertools.repeat(Fault({"error": {"code": "insufficient_quota"}}, 429)))
    with pytest.raises(BatchFailed, match="insufficient_quota"):
        Served(server.url, "judge", cache).generate([ask("?")])
    assert len(server.bodies) == 1


def test_a_refused_request_does_not_stop_the_others(serve, cache):
    server = serve([Fault(b"too long", 400)])
    judge = Served(server.url, "judge", cache, concurrency=1)
    with pytest.raises(BatchFailed, match="1 of 4 calls failed, 3 were answered, 0 were not") as raised:
        judge.generate([ask(str(i)) for i in range(4)])
    assert isinstance(raised.value.results[0], CallFailed)
    assert [result.text for result in raised.value.results[1:]] == ["[[A]]"] * 3


def test_after_a_fault_of_the_server_nothing_more_is_sent_and_the_disk_still_answers(serve, cache):
    server = serve()
    judge = Served(server.url, "judge", cache, concurrency=1)
    judge.generate([ask("3")])
    server.faults = itertools.repeat(Fault(b"wrong key", 401))
    with pytest.raises(BatchFailed, match="1 of 4 calls failed, 1 were answered, 2 were not sent"):
        judge.generate([ask(str(i)) for i in range(4)])
    assert len(server.bodies) == 2


def test_a_server_that_dies_in_a_batch_and_comes_back(serve, cache):
    first = serve(work=0.05)
    judge = Served(first.url, "judge", cache, deadline=20, concurrency=4)
    done = []
    batch = threading.Thread(target=lambda: done.append(judge.generate([ask(str(i)) for i in range(40)])))
    batch.start()
    while len(first.bodies) < 15:
        time.sleep(0.01)
    first.die()
    time.sleep(0.5)
    second = serve(port=first.server_port)
    batch.join()
    assert [completion.text for completion in done[0]] == ["[[A]]"] * 40
    asked = [body["messages"][0]["content"] for body in first.bodies + second.bodies]
    assert set(asked) == {str(i) for i in range(40)}
    assert len(asked) <= 40 + 4  # what was in flight, and nothing that was answered
    assert judge.usage.answered == 40 and judge.usage.retries >= 4


# ---- how many at a time, and how often -------------------------------------------------


def test_the_concurrency_is_reached_and_held_also_by_two_threads(serve, cache):
    server = serve(work=0.05)
    judge = Served(server.url, "judge", cache, concurrency=3)
    threads = [threading.Thread(target=judge.generate, args=([ask(f"{k} {i}") for i in range(9)],))
               for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most == 3 and len(server.bodies) == 18


def test_equal_requests_are_one_flight_in_a_batch_and_among_generators(serve, cache):
    server = serve(work=0.2)
    judges = [Served(server.url, "judge", cache) for _ in range(3)]
    threads = [threading.Thread(target=judge.generate, args=([ask("same")] * 5,)) for judge in judges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.bodies) == 1
    assert sum(judge.usage.answered for judge in judges) == 1
    assert sum(judge.usage.cached for judge in judges) == 14


VARIANTS = [
    ask("a"), ask("b"), ask("a", temperature=0.5), ask("a", seed=1), ask("a", stop=("\n",)),
    ask("a", prefix="<think>"), ask("a", top_logprobs=0), ask("a", top_logprobs=2),
    Request("a", max_new_tokens=5), Request("a", max_new_tokens=6),
    Request([{"role": "system", "content": "a"}], max_new_tokens=5),
    Request([{"role": "user", "content": [image_part(b"1")]}], max_new_tokens=5),
    Request([{"role": "user", "content": [image_part(b"2")]}], max_new_tokens=5),
    *ask("a").times(3),
]


def test_all_that_changes_an_answer_changes_the_key():
    def keys(model="m", url="u", options=None):
        made = [served.request_body(request, model, options or {}) for request in VARIANTS]
        return {call_key(url + path, body) for path, body in made}

    groups = [keys(), keys(model="n"), keys(url="v"), keys(options={"tools": [{"type": "function"}]}),
              keys(options={"top_p": 0.9})]
    assert len(set().union(*groups)) == 5 * len(VARIANTS)
    assert keys() == keys()


def test_the_order_of_results_is_that_of_requests(serve, cache):
    def echo(body):
        time.sleep(random.random() / 50)
        return answer(body["messages"][0]["content"])

    judge = Served(serve(answers=echo).url, "judge", cache)
    texts = [str(i % 30) for i in range(60)]
    assert [completion.text for completion in judge.generate([ask(text) for text in texts])] == texts


def test_tokens_and_cost_are_totalled_once(serve, cache):
    server = serve()
    judge = Served(server.url, "judge", cache, price=(1.0, 10.0))
    judge.generate([ask("a"), ask("b"), ask("a")])
    judge.generate([ask("a")])
    usage = judge.usage
    assert (usage.answered, usage.cached) == (2, 2)
    assert (usage.prompt_tokens, usage.completion_tokens) == (14, 6)
    assert usage.cost == pytest.approx((14 * 1 + 6 * 10) / 1e6)
    [(model, totals)] = cache.totals().items()
    assert model == "judge" and (totals.calls, totals.prompt_tokens, totals.completion_tokens) == (2, 14, 6)


# ---- killed in the middle --------------------------------------------------------------


RUN = """
import sys
from alignkit.generate.cache import Cache
from alignkit.generate.served import Served
from alignkit.generate.text import Request
url, path, count = sys.argv[1:]
judge = Served(url, "judge", Cache(path), concurrency=4)
requests = [Request([{"role": "user", "content": str(i)}], 5) for i in range(int(count))]
texts = [completion.text for completion in judge.generate(requests)]
assert texts == [str(i) for i in range(int(count))]
"""


def start_run(server, path, count):
    return subprocess.Popen([sys.executable, "-c", RUN, server.url, str(path), str(count)],
                            stderr=subprocess.PIPE, text=True)


def killed_until_done(server, path, count, kills, signals=(signal.SIGKILL,)):
    "Kill a run after some more requests, again and again; then let it end. Answers known at each kill."
    known = []
    for number in range(kills):
        goal = len(server.bodies) + random.randrange(1, max(2, count // kills))
        run = start_run(server, path, count)
        while len(server.bodies) < goal and run.poll() is None:
            time.sleep(0.002)
        run.send_signal(signals[number % len(signals)])
        run.communicate()
        with contextlib.closing(sqlite3.connect(path)) as file:
            known.append((len(server.bodies), {json.loads(request)["body"]["messages"][0]["content"]
                          for request, in file.execute("select request from calls where answer notnull")}))
    run = start_run(server, path, count)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    return known


def echo(body):
    return answer(body["messages"][0]["content"])


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("count, kills", [
    (40, 4), pytest.param(200, 30, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_a_killed_run_repeats_no_finished_call(serve, tmp_path, count, kills):
    server = serve(work=0.02, answers=echo)
    path = tmp_path / "calls.sqlite"
    known = killed_until_done(server, path, count, kills, (signal.SIGKILL, signal.SIGKILL, signal.SIGINT))
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert set(asked) == {str(i) for i in range(count)}
    assert len(asked) <= count + 4 * kills  # only what was in flight at a kill
    for sent, finished in known:
        assert not finished & set(asked[sent:])
    with contextlib.closing(sqlite3.connect(path)) as file:
        rows = file.execute("select answer notnull, process, claims from calls").fetchall()
    assert len(rows) == count and all(answered and process is None for answered, process, _ in rows)
    assert sum(claims for *_, claims in rows) >= len(asked)  # written down before it was sent


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_two_processes_share_a_cache_and_ask_once(serve, tmp_path):
    server = serve(work=0.02, answers=echo)
    runs = [start_run(server, tmp_path / "calls.sqlite", 30) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
    assert len(server.bodies) == 30


def test_a_new_file_that_somebody_else_is_making_is_waited_for(tmp_path):
    path = tmp_path / "calls.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("begin immediate")
        release = threading.Timer(0.3, other.execute, ["rollback"])
        release.start()
        Cache(path).close()
        release.join()


def test_a_full_disk_and_a_broken_file_are_named(tmp_path):
    path = tmp_path / "calls.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(CacheError, match="calls.sqlite: file is not a database"):
        Cache(path)
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as file:
        file.execute("pragma user_version=99")
    with pytest.raises(CacheError, match="version 1, got 99"):
        Cache(path)


# ---- what it says it can, and what it must not say -------------------------------------


@pytest.mark.parametrize("request_, ability", [
    (Request("text", max_new_tokens=5), "continues"), (ask("?", prefix="<think>"), "continues"),
    (ask("?", top_logprobs=1), "logprobs"),
    (Request([{"role": "user", "content": [image_part(b"1")]}], max_new_tokens=5), "images")])
def test_what_it_cannot_is_refused_before_anything_is_sent(serve, cache, request_, ability):
    server = serve()
    able = {"continues", "logprobs", "images"} - {ability}
    with pytest.raises(NotAble, match=rf"requests\[1\]: Served cannot .*'{ability}'"):
        Served(server.url, "judge", cache, can=able).generate([ask("fine"), request_])
    assert not server.bodies


def test_log_probabilities_that_did_not_come_are_an_error(serve, cache):
    judge = Served(serve().url, "judge", cache, can={"logprobs"}, deadline=1)
    with pytest.raises(BatchFailed, match="expected logprobs, got None"):
        judge.generate([ask("?", top_logprobs=1)])


def test_log_probabilities_survive_the_disk(serve, cache):
    content = [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "A", "logprob": -0.1},
                                                                {"token": "B", "logprob": -2.4}]}]
    choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": content}}
    judge = Served(serve(answers=lambda body: answer(choices=[choice])).url, "judge", cache,
                   can={"logprobs"})
    first, second = (judge.generate([ask("?", top_logprobs=2)]) for _ in range(2))
    assert first == second and judge.usage.answered == 1
    assert first[0].tokens[0].top == {"A": -0.1, "B": -2.4}


@pytest.mark.parametrize("message, finish, text, reasoning", [
    ({"content": None, "reasoning_content": "so"}, "length", "", "so"),
    ({"content": "[[A]]", "reasoning": "so"}, "stop", "[[A]]", "so"),
    ({"content": None, "refusal": "I will not"}, "stop", "I will not", ""),
    ({"content": None}, "content_filter", "", ""),
])
def test_text_may_be_elsewhere(message, finish, text, reasoning):
    body = answer(choices=[{"message": message, "finish_reason": finish}])
    found = parse_completion(json.dumps(body), False)
    assert (found.text, found.reasoning, found.finish_reason) == (text, reasoning, finish)


def test_a_secret_is_nowhere_but_in_the_header(serve, tmp_path, monkeypatch, caplog):
    secret = "sk-planted/7f3a+91"
    forms = [secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")]
    monkeypatch.setenv("PLANTED_KEY", secret)
    caplog.set_level(logging.DEBUG)
    leak = " ".join(forms)
    server = serve([Fault(f"wrong key {leak}".encode(), 500), Fault(f"<p>{leak}</p>".encode()),
                    Fault(answer(f"[[A]] {leak}")), Fault(f"Incorrect key {leak}".encode(), 401)])
    cache = Cache(tmp_path / "calls.sqlite")
    judge = Served(server.url, "judge", cache, api_key_variable="PLANTED_KEY", concurrency=1)
    shown = [repr(judge.generate([ask("a")]))]
    with pytest.raises(BatchFailed) as raised:
        judge.generate([ask("b")])
    cache.close()
    assert server.headers[0]["Authorization"] == f"Bearer {secret}"
    failure = raised.value.results[0]
    assert failure.__cause__ is None
    shown += [str(raised.value), repr(failure), repr(pickle.dumps(vars(failure))), repr(vars(judge)),
              caplog.text]
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert not [form for form in forms for text in shown if form in text]
    assert "[secret]" in shown[0]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://me:pw@host/v1",
                                 "http://host/v1?api-key=pw", ""])
def test_an_address_that_is_none_or_holds_a_secret(cache, url):
    with pytest.raises(ValueError, match="^base_url: ") as raised:
        Served(url, "judge", cache)
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize("change, name", [({"deadline": 0}, "deadline"), ({"concurrency": 0}, "concurrency"),
                                          ({"api_key_variable": "NO_SUCH"}, "api_key_variable"),
                                          ({"options": {"top_p": float("nan")}}, "options")])
def test_wrong_arguments_are_refused_by_name(cache, change, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        Served("http://localhost/v1", "judge", cache, **change)


def test_it_works_where_an_event_loop_runs_as_in_jupyter(serve, cache):
    import asyncio

    judge = Served(serve().url, "judge", cache)

    async def cell():
        return judge.generate([ask("?")])

    assert asyncio.run(cell())[0].text == "[[A]]"


# ---- a real server ---------------------------------------------------------------------


@contextlib.contextmanager
def transformers_serve(folder):
    "The address of a real server of the model in `folder`."
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
               str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
               "--dtype", "float32"]
    log = (folder.parent / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, (folder.parent / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()


def saved(lm, reader, folder):
    lm.generation_config.eos_token_id = lm.generation_config.pad_token_id = 0
    lm.generation_config.do_sample = True  # or this server stays greedy at every temperature
    lm.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "`transformers serve` with a tiny random model that sees, and the same model in this process."
    from test_vision import letter_tokenizer, tiny_processor, tiny_vision_lm

    from alignkit.generate.model import LocalModel

    processor = tiny_processor(letter_tokenizer())
    lm = tiny_vision_lm(processor, seed=0, positions=128)
    folder = saved(lm, processor, tmp_path_factory.mktemp("real") / "tiny")
    with transformers_serve(folder) as url:
        yield url, str(folder), LocalModel(lm, processor)


@pytest.fixture(scope="module")
def real_text(tmp_path_factory):
    "The same with a model of text alone: the server cannot stop one that sees at a string."
    from test_vision import letter_tokenizer

    from alignkit.generate.model import LocalModel
    from alignkit.models.language import tiny_causal_lm

    tokenizer = letter_tokenizer()
    lm = tiny_causal_lm(tokenizer, seed=0, positions=128)
    folder = saved(lm, tokenizer, tmp_path_factory.mktemp("real_text") / "tiny")
    with transformers_serve(folder) as url:
        yield url, str(folder), LocalModel(lm, tokenizer)


def test_a_real_server_writes_what_the_model_writes_here(real, cache):
    url, name, local = real
    judge = Served(url, name, cache, can={"continues"}, deadline=60)
    requests = [ask("who", temperature=0), ask("longer question", temperature=0),
                Request("go on", 9, temperature=0, prefix=" now"), Request("a", 3, temperature=0)]
    theirs, ours = judge.generate(requests), local.generate(requests)
    for their, our in zip(theirs, ours, strict=True):
        assert (their.text, their.finish_reason) == (our.text, our.finish_reason)
        assert their.prompt_tokens == our.prompt_tokens
        assert abs(their.completion_tokens - our.completion_tokens) <= 1  # the end of text, or not
    assert judge.generate(requests) == theirs and judge.usage.answered == len(requests)


def test_a_real_server_sees_what_the_model_sees_here(real, cache):
    from test_vision import BLUE, RED
    from test_vision import ask as show

    url, name, local = real
    requests = [show("what", *images, temperature=0) for images in ([RED], [BLUE], [RED, BLUE])]
    theirs = Served(url, name, cache, can={"images"}, deadline=60).generate(requests)
    ours = local.generate(requests)
    assert [(their.text, their.prompt_tokens) for their in theirs] == [(our.text, our.prompt_tokens) for our in ours]
    assert theirs[0].text != theirs[1].text


def test_a_real_server_draws_by_the_seed_and_refuses_by_name(real, cache, tmp_path):
    url, name, _ = real
    judge = Served(url, name, cache, can={"continues", "logprobs"}, deadline=60, concurrency=1)
    drawn = judge.generate(ask("who", temperature=1.0).times(6))
    assert len({completion.text for completion in drawn}) > 3
    other = Cache(tmp_path / "other.sqlite")
    again = Served(url, name, other, concurrency=1).generate(ask("who", temperature=1.0).times(6))
    other.close()
    assert again == drawn
    with pytest.raises(BatchFailed, match="expected logprobs, got None"):
        judge.generate([ask("who", top_logprobs=2)])
    with pytest.raises(BatchFailed, match="status 422: .*continue_final_message"):
        judge.generate([ask("who", prefix="<think>")])
    with pytest.raises(BatchFailed, match="status 400: .*pinned"):
        Served(url, "another", cache).generate([ask("who")])


def test_a_real_server_is_made_to_think_longer_as_the_model_here_is(real_text, cache):
    "Plain strings, which this server continues; a curve asked again asks nothing."
    from alignkit.judging.scaling import BudgetForcing

    url, name, local = real_text
    judge = Served(url, name, cache, can={"continues"}, deadline=60)
    requests = [Request(text, 40, temperature=0) for text in ("which", "which of these")]
    for waits, where in ((0, "thinking"), (2, "verdict")):  # this model ends no thought by itself
        options = {"continuation": " wait", "where": where, "answer_tokens": 6}
        forcing = BudgetForcing(judge, waits, **options)
        theirs, ours = forcing.generate(requests), BudgetForcing(local, waits, **options).generate(requests)
        for their, our in zip(theirs, ours, strict=True):
            assert (their.text, their.thoughts, their.truncated) == (our.text, our.thoughts, our.truncated)
            assert their.thinking_tokens == our.thinking_tokens and their.text.count(" wait") == waits
        asked = judge.usage.answered
        assert forcing.generate(requests) == theirs and judge.usage.answered == asked


def test_a_real_server_is_judged_from_the_command_line(real, tmp_path, monkeypatch, capsys):
    "A tiny random model writes no verdict: all of it is counted, and nothing is asked twice."
    from alignkit import cli

    url, name, local = real
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}?", "chosen": "right", "rejected": "wrong"} for i in range(2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = ("judge", "pairs.jsonl", "--judge", url, "--model", name, "--max-tokens", "6", "--json")
    assert cli.main(judge) == 0
    found = json.loads(capsys.readouterr().out)
    assert [sum(counts.values()) for counts in found["outcomes"].values()] == [2, 2]
    assert found["figures"]["unread"]["value"] == 1 and found["tokens"]["completion"] > 0
    said = [json.loads(line) for line in (tmp_path / found["judgements"]).read_text().splitlines()]
    assert len({one["prompt_tokens"] for one in said}) == 1 and all(one["text"] for one in said)
    monkeypatch.setattr(served._Batch, "_call", lambda *_: pytest.fail("asked again"))
    assert cli.main(judge) == 0 and json.loads(capsys.readouterr().out) == found
