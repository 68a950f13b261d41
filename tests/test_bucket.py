"""Buckets: images are put to a real S3 server (moto's) and come back as links; refusals read well and leak nothing."""

import base64
import http.server
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import boto3
import numpy as np
import pytest
import requests
from PIL import Image

import handler

KEY_ID, SECRET = "CANARYKEYID0123456", "canary/secret+0123456789abcdefghijklmnop"
CONFIG = {"accessId": KEY_ID, "accessSecret": SECRET, "bucketName": "mine", "endpointUrl": "http://s3.invalid"}
SMALL = {"prompt": "a lighthouse at dusk", "width": 256, "height": 256, "steps": 1, "seed": 7}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of moto's server, in a process of its own."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                requests.get(f"{url}/moto-api/", timeout=5)
                break
            except requests.ConnectionError:
                assert server.poll() is None, "moto's server ended"
                time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait(10)


def create_bucket(url: str, name: str) -> None:
    session = boto3.Session(aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET, region_name="us-east-1")
    session.client("s3", endpoint_url=url).create_bucket(Bucket=name)


def run(endpoint: str, name: str = "pictures", job_id: str = "job", **fields) -> dict:
    """The worker's answer to a job that brings this bucket along; no answer holds its credentials."""
    config = CONFIG | {"bucketName": name, "endpointUrl": endpoint}
    answer = handler.handler({"id": job_id, "input": SMALL | fields, "s3Config": config})
    assert SECRET not in json.dumps(answer)
    return answer


def refusal(endpoint: str, name: str = "pictures") -> str:
    """Why a job's image was not uploaded."""
    answer = run(endpoint, name)
    assert set(answer) == {"error", "code"} and answer["code"] == "UPLOAD_FAILED" and KEY_ID not in answer["error"]
    return answer["error"]


@pytest.fixture
def enforced(s3) -> Iterator[None]:
    """The server checks credentials from here on; no account is known to it."""
    requests.post(f"{s3}/moto-api/reset-auth", data="0", timeout=5)
    yield
    requests.post(f"{s3}/moto-api/reset-auth", data="inf", timeout=5)


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_links_lead_to_the_files(s3, image_format):
    """Each link gives its image, with the format's content type, below the job's id, for seven days."""
    create_bucket(s3, "pictures")
    links = run(s3, job_id="job-1", num_images=3, image_format=image_format)["images"]
    assert len(set(links)) == 3
    for link in links:
        reply = requests.get(link, timeout=10)
        assert (reply.status_code, reply.headers["Content-Type"]) == (200, f"image/{image_format}")
        assert Image.open(io.BytesIO(reply.content)).format == image_format.upper()
        assert re.match(rf"{s3}/pictures/job-1/[0-9a-f]+\.{image_format}\?", link) and "X-Amz-Expires=604800" in link


@pytest.mark.usefixtures("pipe")
def test_a_job_sent_again_keeps_the_first_ones_images(s3):
    """The same job id twice: the earlier link still shows the earlier image."""
    create_bucket(s3, "pictures")
    (first,) = run(s3, job_id="job-2")["images"]
    before = requests.get(first, timeout=10).content
    (second,) = run(s3, job_id="job-2", seed=8)["images"]
    assert requests.get(first, timeout=10).content == before != requests.get(second, timeout=10).content


@pytest.mark.usefixtures("pipe")
def test_a_missing_bucket_is_named(s3):
    """UPLOAD_FAILED with S3's own code in the sentence, without refresh_worker; the next job works."""
    assert refusal(s3, "not-there") == "the bucket refused the image: NoSuchBucket"
    assert "images" in handler.handler({"id": "next", "input": SMALL})


@pytest.mark.usefixtures("pipe", "enforced")
def test_refused_credentials_are_said_so(s3):
    """Credentials that the server does not know: its code, and neither of them."""
    codes = ("InvalidAccessKeyId", "AccessDenied")
    assert refusal(s3) in (f"the bucket refused the image: {code}" for code in codes)


@pytest.mark.usefixtures("pipe")
@pytest.mark.parametrize(
    ("endpoint", "name"),
    [("ftp//nowhere", "pictures"), ("http://user:pw@ :1", "pictures"), ("{s3}", "A bad name!")],
)
def test_unusable_addresses_and_names(s3, endpoint, name):
    """An endpoint or bucket name that is none: what to check, in one sentence."""
    error = refusal(endpoint.format(s3=s3), name)
    assert "check the bucket's endpoint and name" in error and "pw" not in error


@pytest.mark.usefixtures("pipe")
def test_an_unreachable_server_ends_soon():
    """Nobody listens: an answer within 30 s, since the job's client waits."""
    started = time.monotonic()
    assert "EndpointConnectionError" in refusal(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 30


def serve(reply: Callable[[http.server.BaseHTTPRequestHandler, bytes], None]) -> http.server.ThreadingHTTPServer:
    """A server that answers each PUT as `reply` says; to be closed."""

    class Server(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            reply(self, self.rfile.read(int(self.headers["Content-Length"])))

        def log_message(self, *_args) -> None:
            """Keeps the test's output clean."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.usefixtures("pipe")
def test_a_passing_fault_is_tried_again():
    """503 twice, then the image is taken: the upload succeeds."""
    seen = []

    def unsteady(request, body) -> None:
        seen.append(body)
        request.send_response(200 if len(seen) == 3 else 503)
        request.send_header("Content-Length", "0")
        request.end_headers()

    server = serve(unsteady)
    assert len(run(f"http://127.0.0.1:{server.server_port}")["images"]) == 1
    server.shutdown()
    assert len(seen) == 3 and len(set(seen)) == 1
    Image.open(io.BytesIO(seen[0])).load()  # whole and plain: no checksum trailers around it


@pytest.mark.usefixtures("pipe")
def test_a_refusal_without_s3s_words_is_read_too():
    """A proxy's HTML page instead of S3's XML: its status is the code."""

    def proxy(request, _body) -> None:
        page = b"<html><body>Forbidden<br></html>"
        request.send_response(403)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)

    server = serve(proxy)
    assert refusal(f"http://127.0.0.1:{server.server_port}") == "the bucket refused the image: 403"
    server.shutdown()


@pytest.mark.usefixtures("pipe", "enforced")
def test_the_secret_is_in_no_log(s3, caplog):
    """At DEBUG of every library, a refused upload logs no secret; at INFO not even the key's id."""
    with caplog.at_level(logging.DEBUG):
        refusal(s3)
    assert SECRET not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.INFO and KEY_ID in record.getMessage()]


# a job's own bucket


@pytest.fixture
def ran(pipe) -> Iterator[list[int]]:
    """What the UNet did."""
    seen: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_args: seen.append(1))
    yield seen
    hook.remove()


@pytest.mark.parametrize("missing", CONFIG)
@pytest.mark.parametrize("value", [None, "", " ", 5, ["x"]])
def test_a_missing_piece_is_named(ran, missing, value):
    """No silent local folder: the missing piece is named before the GPU works, the others' values are not."""
    answer = handler.handler({"id": "e", "input": SMALL, "s3Config": CONFIG | {missing: value}})
    needed = "s3Config needs endpointUrl, accessId, accessSecret, bucketName as text"
    assert answer == {"error": f"{needed}; missing: {missing}", "code": "UPLOAD_FAILED"} and not ran


@pytest.mark.parametrize("config", [{}, [], "http://s3.invalid", 7, True])
def test_an_s3_config_of_another_shape_is_refused(ran, config):
    """What is no object of these four texts is UPLOAD_FAILED, too; null is none."""
    answer = handler.handler({"id": "e", "input": SMALL, "s3Config": config})
    assert answer["code"] == "UPLOAD_FAILED" and not ran
    assert answer["error"].endswith("missing: endpointUrl, accessId, accessSecret, bucketName")


# pictures and settings


def test_a_jobs_images_go_to_its_bucket(pipe, s3, monkeypatch):
    """s3Config wins over BUCKET_*, whose bucket is named by month and year as the SDK's; the answer holds links to the
    same pictures that it would hold in base64. A null s3Config is none."""
    create_bucket(s3, "mine")
    create_bucket(s3, time.strftime("%m-%y"))
    plain = handler.handler({"id": "a", "input": SMALL, "s3Config": None})
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET)
    worker = handler.handler({"id": "b", "input": SMALL})
    own = handler.handler({"id": "c", "input": SMALL, "s3Config": CONFIG | {"endpointUrl": s3}})
    for answer, place in ((worker, f"{time.strftime('%m-%y')}/b"), (own, "mine/c")):
        assert SECRET not in json.dumps(answer) and answer["metadata"]["image_format"] == "png"
        assert len(answer["images"]) == 1
        for link, image in zip(answer["images"], plain["images"], strict=True):
            assert link.startswith(f"{s3}/{place}/")
            stored, expected = (
                np.asarray(Image.open(io.BytesIO(data)))
                for data in (requests.get(link, timeout=10).content, base64.b64decode(image))
            )
            assert (stored == expected).all()


def test_a_bucket_takes_images_of_any_size(pipe, s3, monkeypatch):
    """MAX_RESPONSE_MB is for base64 alone: with a bucket the files stay PNGs."""
    create_bucket(s3, "mine")
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.015")
    job = {"id": "d", "input": SMALL}
    assert handler.handler(job)["metadata"]["image_format"] == "jpeg"
    answer = handler.handler(job | {"s3Config": CONFIG | {"endpointUrl": s3}})
    assert answer["metadata"]["image_format"] == "png" and not answer["metadata"]["warnings"]


@pytest.mark.usefixtures("pipe")
def test_boto3s_own_environment_is_not_used(s3, monkeypatch):
    """AWS_* of the container does not replace the bucket's credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "someone-elses")
    create_bucket(s3, "pictures")
    (link,) = run(s3)["images"]
    assert KEY_ID in link and boto3.Session().get_credentials().access_key == "someone-else"
