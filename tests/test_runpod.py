"""The worker on RunPod: real processes against a queue on loopback, on the tiny model world where the claim is about
jobs, without models (light_worker.py) where it is about the queue."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runpod_server import KEY, ROOT, Job, Post, RunPodServer, Worker
from soak import OUT_OF_MEMORY_WIDTH, STOP_S, random_job, soak, soak_stops

sys.path.append(str(Path(__file__).with_name("benchmarks")))
from idle_gpu import measure

BREAKABLE = str(Path(__file__).with_name("breakable_worker.py"))
LIGHT = str(Path(__file__).with_name("light_worker.py"))
SHORT = {"prompt": "a cat", "width": 256, "height": 256, "steps": 2, "seed": 1}
LONG = {**SHORT, "steps": 40}
SECRET = "canary-bucket-secret-9f8e7d"
PROMPT = "canary prompt with violet otters"


@pytest.fixture
def server():
    """A queue whose worker broke no rule of it and answered no job twice."""
    with RunPodServer() as server:
        yield server
    assert_clean(server)


def assert_clean(server: RunPodServer) -> None:
    assert server.violations == []
    assert [job.id for job in server.jobs.values() if len(job.results) > 1] == []
    stopped = [job for job in server.jobs.values() if job.stopped]
    assert [job.id for job in stopped if any(post.arrived > job.stopped + STOP_S for post in posts(job))] == []


def posts(job: Job) -> list[Post]:
    return [*job.progress, *job.attempts]


@pytest.fixture
def start_light(server, tmp_path):
    """Starts workers in the test's folder, without models; none of them outlives the test."""
    workers = []

    def start_worker(*command: str, **environ: str) -> Worker:
        workers.append(Worker(server, tmp_path, environ, *(command or (LIGHT,))))
        return workers[-1]

    yield start_worker
    for worker in workers:
        worker.__exit__()


@pytest.fixture
def start(start_light, world):
    """Starts workers on the tiny world, without LoRAs."""
    environ = {**world.environ(), "LORAS": ""}
    return lambda *command, **more: start_light(*(command or (str(ROOT / "handler.py"),)), **(environ | more))


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory):
    """One worker for the tests that leave it in working order, with every log line on; (queue, worker, folder)."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tmp").mkdir()
    environ = {**world.environ(), "LORAS": "135867,294259", "RUNPOD_LOG_LEVEL": "DEBUG", "TMPDIR": str(folder / "tmp")}
    with RunPodServer() as server, Worker(server, folder, environ, BREAKABLE) as worker:
        yield server, worker.ready(), folder
    assert_clean(server)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The same without models."""
    folder = tmp_path_factory.mktemp("light")
    with RunPodServer() as server, Worker(server, folder, {}, LIGHT) as worker:
        server.wait_for(lambda: server.pings)
        yield server, worker.ready(), folder
    assert_clean(server)


@pytest.fixture
def breaks(light):
    """Breaks the light worker in one way, for one test."""
    file = light[2] / "break"
    yield file.write_text
    file.unlink(missing_ok=True)


def is_good(result: dict) -> bool:
    return "error" not in result and len(result["output"]["images"]) == 1


def family(worker: Worker) -> list[int]:
    """The worker's processes that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == worker.process.pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# every job answered


def test_jobs_and_failures_are_answered(shared):
    """A good job, a refused one and one out of memory are each answered as the SDK would, and the worker goes on."""
    server = shared[0]
    assert is_good(server.result(server.submit(SHORT)))
    refused = server.result(server.submit({**SHORT, "width": 1023}))
    assert refused["output"] == {"code": "INVALID_INPUT"} and "width" in refused["error"] and len(refused) == 2
    failed = server.result(server.submit({**SHORT, "width": OUT_OF_MEMORY_WIDTH}))
    assert failed["output"] == {"code": "OUT_OF_MEMORY"} and len(failed) == 2
    assert is_good(server.result(server.submit(SHORT)))


def test_what_the_queue_sends_is_answered_where_it_has_an_id(shared):
    """Jobs without input, with NaN, 5,000 digits or lone surrogates are answered."""
    server = shared[0]
    bad = [server.submit_raw({"id": "x-1"}, "x-1"), server.submit({**SHORT, "bad\ud800": 1}), server.submit(None)]
    for number in (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-" + b"9" * 5000):
        job_id = f"n-{len(bad)}"
        body = b'{"id": "%s", "input": {"prompt": "a", "seed": %s}}' % (job_id.encode(), number)
        bad.append(server.submit_raw(body, job_id))
    surrogate = server.submit({**SHORT, "prompt": "a \ud800 cat"})
    assert {server.result(job_id)["output"]["code"] for job_id in bad} == {"INVALID_INPUT"}
    assert "U+FFFD" in server.result(surrogate)["output"]["metadata"]["warnings"][0]


def test_polls_that_bring_no_job(light):
    """After an answer of 200 without a job the queue is asked again in a second, and the log says so once a minute."""
    server, worker, _ = light
    server.wait_for(server.open_polls)
    first = len(server.polls) - 1
    for nothing in ([1], {"input": SHORT}, b"{", b"[" * 100_000):
        server.submit_raw(nothing)
    assert is_good(server.result(server.submit(SHORT)))
    brought = [poll for poll in server.polls[first:] if poll.taken][:5]
    assert all(later.started - earlier.ended > 0.95 for earlier, later in itertools.pairwise(brought))
    assert worker.log.read_text().count("brought no id: HTTP 200") == 1


@pytest.mark.parametrize("how", ["object", "nan", "deep", "cycle"])
def test_an_answer_that_is_no_json(light, breaks, how):
    """An answer that strict JSON cannot carry becomes GENERATION_FAILED instead of a job that hangs."""
    breaks(how)
    result = light[0].result(light[0].submit(SHORT))
    assert result["output"] == {"code": "GENERATION_FAILED"} and "stopPod" not in result


def test_a_job_that_cannot_be_begun(light, breaks):
    """What fails between taking a job and its turn is answered, and the next job is taken."""
    server = light[0]
    breaks("threadless")
    assert server.result(server.submit(SHORT))["output"] == {"code": "GENERATION_FAILED"}
    breaks("")
    assert is_good(server.result(server.submit(SHORT)))


def test_answers_are_posted_until_they_are_accepted(light):
    """Resets, 429 and 5xx on the result's post are tried again, beside the next job; it is accepted once."""
    server = light[0]
    server.inject("job-done", ["reset", 429, 500, 503], "job-retried")
    server.submit_raw({"id": "job-retried", "input": SHORT}, "job-retried")
    beside = server.submit(SHORT)
    assert is_good(server.result("job-retried")) and is_good(server.result(beside))
    assert [post.status for post in server.jobs["job-retried"].attempts] == [-1, 429, 500, 503, 200]
    assert server.jobs[beside].results[0].arrived < server.jobs["job-retried"].results[0].arrived


def test_a_refused_answer_is_replaced(light):
    """What RunPod refuses for good is answered by a short error: clients would see COMPLETED without output."""
    server = light[0]
    server.inject("job-done", [413], "job-refused")
    server.submit_raw({"id": "job-refused", "input": SHORT}, "job-refused")
    assert server.result("job-refused")["output"] == {"code": "GENERATION_FAILED"}


def test_a_failing_queue_is_asked_again(light):
    """204, 400, a 5xx and a reset of the poll keep no job from being taken."""
    server = light[0]
    server.inject("job-take", [204, 400, 503, "reset"])
    server.result(server.submit(SHORT))
    assert is_good(server.result(server.submit(SHORT)))
    assert server.fault("job-take") is None


# ---------------------------------------------------------------------------------------------------------------------
# progress, heartbeat, jobs in flight


def test_progress_and_heartbeat(light, breaks):
    """Updates name step, steps and percent, at most one a second, each answered before the result is sent; the
    heartbeat names the job while it is held, and no longer."""
    server = light[0]
    breaks("hold")
    job = server.jobs[server.submit({**SHORT, "steps": 120})]
    server.wait_for(lambda: any(ping.ids == [job.id] for ping in server.pings))
    server.wait_for(lambda: len(job.progress) > 1)
    breaks("")
    server.result(job.id)
    updates = [post.payload["output"] for post in job.progress]
    assert updates[0] == {"step": 1, "steps": 120, "percent": 1} and len(updates) > 1
    assert all(set(post.payload) == {"status", "output"} for post in job.progress)
    assert all(later.arrived - earlier.arrived >= 1 for earlier, later in itertools.pairwise(job.progress))
    assert job.progress[-1].ended <= job.results[0].arrived
    seen = len(server.pings)
    server.wait_for(lambda: len(server.pings) >= seen + 2)
    assert server.pings[-1].ids == []


def test_a_heartbeat_that_fails_begins_anew(light, breaks):
    """Whatever ends the SDK's heartbeat is logged, and pings come again."""
    server, worker, _ = light
    breaks("mute")
    server.wait_for(lambda: "the heartbeat failed" in worker.log.read_text())
    breaks("")
    seen = len(server.pings)
    server.wait_for(lambda: len(server.pings) >= seen + 2)


def test_a_hanging_update_is_closed_before_the_result(light):
    """An update that RunPod does not answer is waited for 2 s at most, and its connection closed before the result."""
    server = light[0]
    server.inject("progress", ["hang"], "job-hanging")
    server.submit_raw({"id": "job-hanging", "input": SHORT}, "job-hanging")
    server.result("job-hanging")
    job = server.jobs["job-hanging"]
    assert len(job.progress) == 1 and job.progress[0].ended <= job.results[0].arrived + 0.05
    assert 1.5 < job.progress[0].ended - job.progress[0].arrived < 4


def test_jobs_in_flight(light):
    """The next job is asked for, alone, while a short one denoises; no more than two are held; polls ask for one."""
    server = light[0]
    jobs = [server.jobs[server.submit({"steps": 30, "encode_s": 1})] for _ in range(3)]
    for job in jobs:
        server.result(job.id)
    for job, following in itertools.pairwise(jobs):
        assert job.taken[0][0] + 1 < following.taken[0][0] < job.results[0].arrived
    events = [(job.taken[0][0], 1) for job in jobs] + [(job.results[0].arrived, -1) for job in jobs]
    held = [sum(change for _, change in sorted(events)[: n + 1]) for n in range(len(events))]
    assert max(held) == 2
    assert {poll.batch for poll in server.polls} == {1}


def test_soak(shared):
    """Different jobs, failures among them, are answered once each as their kind asks; none alters the one after it."""
    server, worker, _ = shared
    soak(server, worker, ["Detail Tweaker XL", "hand_detail_flux_xl"], jobs=20, every=10)


@pytest.mark.parametrize(("gpu_s", "jobs", "fetch_s"), [(0.6, 6, 0.0), (4.5, 3, 0.3)])
def test_idle_gpu(gpu_s, jobs, fetch_s):
    """Between two jobs of a full queue the GPU idles for 50 ms at most, encoding, posting and slow answers of job-take
    notwithstanding; and no job is taken more than 3 s before its turn, however long the one before it lasts."""
    found = measure("loop", argparse.Namespace(gpu=gpu_s, images=0.3, jobs=jobs, fetch=fetch_s))
    assert found["max"] <= 50
    assert found["ahead"] < 3.5


def test_four_workers_in_one_folder():
    """Four workers started in one folder share a queue: each job is answered once, and no worker blocks another."""
    found = measure("loop", argparse.Namespace(gpu=0.5, images=0.2, jobs=16, fetch=0.0), workers=4)
    assert found["jobs"] == 16 and found["fewest"] >= 2


# ---------------------------------------------------------------------------------------------------------------------
# jobs that RunPod stops

MOMENTS = {  # what a job is like that is long in a phase
    "encoding": {"encode_s": 1.0},
    "denoising": {"steps": 500},
    "decoding": {"decode_s": 1.0},
    "posting": {},
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_job_is_not_answered(light, moment):
    """A job that is stopped while it encodes, denoises, decodes or is posted is not posted, nor posted again; the
    heartbeat drops it, and the next job has the GPU."""
    server, job_id = light[0], f"job-{moment}"
    server.inject("job-done", ["hang"], job_id)
    server.submit_raw({"id": job_id, "input": {**SHORT, **MOMENTS[moment]}}, job_id)
    job = server.jobs[job_id]
    ready = {"encoding": lambda: job.taken, "decoding": lambda: job.progress, "denoising": lambda: job.progress}
    server.wait_for(ready.get(moment, lambda: job.attempts))
    server.stop(job_id)
    following = server.submit(SHORT)
    assert is_good(server.result(following, 5))
    assert job.stopped and not job.results and len(job.attempts) == (moment == "posting")
    assert all(post.ended < job.stopped + STOP_S for post in posts(job))
    seen = len(server.pings)
    server.wait_for(lambda: len(server.pings) >= seen + 2)
    assert server.pings[-1].ids == []


def test_a_stopped_job_that_waits_for_the_gpu(light):
    """A job that is stopped before its turn makes room for another at once, and the running one is answered."""
    server = light[0]
    running, waiting = (server.jobs[server.submit({"steps": 120})] for _ in range(2))
    server.wait_for(lambda: waiting.taken)
    server.stop(waiting.id)
    following = server.jobs[server.submit(SHORT)]
    assert is_good(server.result(running.id)) and is_good(server.result(following.id))
    assert following.taken[0][0] < running.results[0].arrived
    assert posts(waiting) == []


def test_stops_of_no_job_here(light):
    """Ids of jobs that are not held, or that are none, are passed over, and the channel is asked on."""
    server, worker, _ = light
    polls = len(server.stop_polls)
    running = server.submit({"steps": 60})
    server.wait_for(lambda: server.jobs[running].progress)
    server.stops += [(worker.pod, wrong) for wrong in ("job-elsewhere", 5, None, [running])]
    assert is_good(server.result(running))
    server.wait_for(lambda: len(server.stop_polls) > polls)
    test_a_stopped_job_that_waits_for_the_gpu(light)


def test_the_stop_channel_fails(tmp_path):
    """Where there is no stop channel, or it is limited, it is left alone for a while; after another failure it is asked
    in 5 s. Jobs are answered, and the log says it once."""
    with contextlib.ExitStack() as stack:  # three queues, a worker each, so that they wait together
        missing, limited, failing = servers = [stack.enter_context(RunPodServer()) for _ in range(3)]
        for server, fault in zip(servers, (404, 429, 503), strict=True):
            server.inject("job-stop", [fault])
        workers = [
            stack.enter_context(Worker(server, tmp_path, {}, LIGHT, pod=f"pod-{n}")) for n, server in enumerate(servers)
        ]
        for server, worker in zip(servers, workers, strict=True):
            worker.ready()
            assert is_good(server.result(server.submit(SHORT)))
        for server in servers:
            server.wait_for(lambda server=server: server.stop_polls and server.stop_polls[0].ended)
        failing.wait_for(lambda: len(failing.stop_polls) > 1)
        assert failing.stop_polls[1].started - failing.stop_polls[0].ended > 4.9
        last = max(server.stop_polls[0].ended for server in servers)
        time.sleep(max(0.0, last + 7 - time.monotonic()))
        assert len(missing.stop_polls) == len(limited.stop_polls) == 1
        for server, worker in zip(servers, workers, strict=True):
            assert worker.log.read_text().count("brought no jobsToStop") == 1
            worker.terminate()
            assert worker.wait(10) == 0
            assert_clean(server)


def test_a_job_is_stopped_after_sigterm(start_light, server):
    """The stop channel does not hold a worker up that was told to end, and is heard until then."""
    worker = start_light().ready()
    job_id = server.submit({"steps": 3000})
    server.wait_for(lambda: server.jobs[job_id].progress)
    worker.terminate()
    time.sleep(0.2)
    server.stop(job_id)
    assert worker.wait(5) == 0
    assert not server.jobs[job_id].attempts


def test_nothing_of_a_stopped_job_stays(shared):
    """Jobs of real models stopped at random, other LoRAs and sizes among them: each other job is answered once, and a
    fixed one gives the same image as before."""
    server, worker, _ = shared
    loras = ["Detail Tweaker XL", "hand_detail_flux_xl"]
    soak_stops(server, worker, lambda dice: random_job(dice, loras)[0], stops=8, every=4)


# ---------------------------------------------------------------------------------------------------------------------
# the end of a worker


def test_killed_and_restarted(start_light, server, tmp_path):
    """After kill -9 in a job nobody pings that job, and a worker started in the same folder takes jobs again, one at a
    time with JOBS_IN_FLIGHT=1; idle, it exits with 0 within 5 s of SIGTERM."""
    first = start_light().ready()
    (tmp_path / "break").write_text("hold")
    dead = server.submit(SHORT)
    server.wait_for(lambda: any(ping.ids == [dead] for ping in server.pings))
    first.process.kill()
    first.wait(5)
    server.wait_for(lambda: not family(first), 2)
    pings, polls = len(server.pings), len(server.polls)
    (tmp_path / "break").unlink()
    second = start_light(JOBS_IN_FLIGHT="1")
    server.wait_for(lambda: len(server.polls) > polls)
    jobs = [server.jobs[server.submit(SHORT)] for _ in range(2)]
    assert all(is_good(server.result(job.id)) for job in jobs)
    assert jobs[1].taken[0][0] > jobs[0].results[0].arrived
    assert not any(dead in ping.ids for ping in server.pings[pings:])
    server.wait_for(server.open_polls)
    second.terminate()
    assert second.wait(5) == 0
    server.wait_for(lambda: not family(second), 2)
    assert not server.jobs[dead].results and not list(tmp_path.glob(".runpod*"))


def test_sigterm_in_a_job(start_light, server):
    """SIGTERM in a job: it is answered, the job that the open poll still brings too, nothing else is asked for."""
    worker = start_light().ready()
    running = server.submit(LONG)
    server.wait_for(lambda: server.jobs[running].progress and server.open_polls())
    worker.terminate()
    polls = len(server.polls)
    brought, left = server.submit(SHORT), server.submit(SHORT)
    assert worker.wait(30) == 0
    assert is_good(server.jobs[running].results[0].payload) and is_good(server.jobs[brought].results[0].payload)
    assert not server.jobs[left].taken and len(server.polls) == polls


@pytest.mark.parametrize("after_s", [0.2, 2.0, 4.0])
def test_sigterm_while_loading(start, after_s):
    """SIGTERM ends a worker within 5 s while it loads, and all that it started."""
    worker = start()
    time.sleep(after_s)
    worker.terminate()
    assert worker.wait(5) in (0, -signal.SIGTERM)  # at first there is only Python
    worker.server.wait_for(lambda: not family(worker), 2)


def test_sigterm_as_pid_1(start):
    """The same as PID 1, which has no default action for signals."""
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--pid", "--fork"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs process namespaces")
    code = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    worker = start("-c", code, *unshare, sys.executable, str(ROOT / "handler.py"))
    time.sleep(3)
    pid = worker.process.pid
    child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    os.kill(child, signal.SIGTERM)
    assert worker.wait(5) == 0


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [("ALLOW_CPU", "0", "ALLOW_CPU"), ("CHECKPOINT_DIR", "/dev/null/below", "MODEL_CACHE_DIR")],
)
def test_a_failed_start_is_answered(start, server, setting, value, named):
    """Models that cannot be made ready, or a store that cannot be written to, are SETUP_FAILED with refresh, told to
    one job; then the worker ends."""
    worker = start(**{setting: value, "LORA_DIR": "/dev/null/below"})  # no file is missing there
    jobs = [server.submit(SHORT) for _ in range(2)]
    result = server.result(jobs[0])
    assert result["output"] == {"code": "SETUP_FAILED"} and result["stopPod"] is True and named in result["error"]
    assert "/dev/null" not in result["error"]
    assert worker.wait(5) == 0
    assert not server.jobs[jobs[1]].taken


def test_a_job_that_comes_after_refresh(start_light, server, tmp_path):
    """A job that the open poll brings after an answer with refresh_worker is answered, not lost."""
    worker = start_light().ready()
    (tmp_path / "break").write_text("escape")
    lost = server.submit({"steps": 100})
    server.wait_for(lambda: server.jobs[lost].taken and server.open_polls())
    assert server.result(lost)["stopPod"] is True
    (tmp_path / "break").unlink()
    assert is_good(server.result(server.submit(SHORT)))
    assert worker.wait(10) == 0


@pytest.mark.parametrize("how", ["fatal", "escape"])
def test_a_lost_gpu_takes_no_more_jobs(request, server, tmp_path, how):
    """A CUDA error that ends the process's use of the GPU, or a failure that no job catches, is answered with refresh;
    no job is asked for after it."""
    worker = request.getfixturevalue("start")(BREAKABLE) if how == "fatal" else request.getfixturevalue("start_light")()
    worker.ready()
    (tmp_path / "break").write_text(how)
    jobs = [server.submit(SHORT) for _ in range(6)]
    lost = server.result(jobs[0])
    assert lost["output"] == {"code": "GENERATION_FAILED"} and lost["stopPod"] is True
    assert "illegal" not in lost["error"]
    assert worker.wait(10) == 0
    taken = [job for job in server.jobs.values() if job.taken]
    assert len(taken) <= 2 and all(len(job.results) == 1 for job in taken)


# ---------------------------------------------------------------------------------------------------------------------
# nothing leaks, and the shared worker's end


def test_canaries(shared):
    """Keys, bucket secrets and prompts are in no log line, update, answer or file, with every log line switched on."""
    from world import API_KEY

    server, worker, folder = shared
    config = {"accessId": "a", "accessSecret": SECRET, "bucketName": "b", "endpointUrl": "http://127.0.0.1:9"}
    job_id = server.submit({**LONG, "prompt": PROMPT}, s3Config=config)
    server.wait_for(lambda: server.jobs[job_id].progress)
    written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    server.result(job_id)
    written += worker.log.read_bytes()
    assert job_id.encode() in written
    posts = [post.payload for job in server.jobs.values() for post in (*job.progress, *job.attempts)]
    for canary in (SECRET, API_KEY, KEY):
        assert canary.encode() not in written and canary not in json.dumps(posts)
    assert PROMPT.encode() not in written and b"a cat" not in written


def test_sigterm_while_idle(light):
    """A job that comes within the last poll of an idle worker told to stop is run and answered."""
    server, worker, _ = light
    # a young one: the queue ends it after 20 s, and the worker told to stop begins no other
    young = lambda: any(time.monotonic() - poll.started < 10 for poll in server.open_polls())  # noqa: E731
    server.wait_for(lambda: young() and server.stop_polls[-1].ended is None, 30)
    worker.terminate()
    time.sleep(0.5)
    job_id = server.submit(SHORT)
    assert worker.wait(10) == 0
    assert is_good(server.jobs[job_id].results[0].payload)
