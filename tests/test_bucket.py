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
from collections.abc import Iterator

import boto3
import numpy as np
import pytest
import requests
from PIL import Image

import handler

KEY_ID, SECRET = "CANARYKEYID0123456", "canary/secret+0123456789abcdefghijklmnop"
SMALL = {"prompt": "a lighthouse at dusk", "width": 256, "height": 256, "steps": 1, "seed": 7, "num_images": 2}


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


def bucket(url: str, name: str | None = "pictures", create: bool = True) -> handler.Bucket:
    target = handler.Bucket(url, KEY_ID, SECRET, name)
    if create:
        handler.s3_client(target).create_bucket(Bucket=name or time.strftime("%m-%y"))
    return target


@pytest.fixture
def enforced(s3) -> Iterator[None]:
    """The server checks credentials from here on; no account is known to it."""
    requests.post(f"{s3}/moto-api/reset-auth", data="0", timeout=5)
    yield
    requests.post(f"{s3}/moto-api/reset-auth", data="inf", timeout=5)


@pytest.mark.parametrize("image_format", handler.ENCODINGS)
def test_links_lead_to_the_files(s3, image_format):
    """Each link gives back the very bytes, with the format's content type, below the job's id, for seven days."""
    files = [b"first", b"second", b"third"]
    links = handler.upload_images(files, image_format, bucket(s3), "job-1")
    assert len(set(links)) == 3
    for file, link in zip(files, links, strict=True):
        reply = requests.get(link, timeout=10)
        assert (reply.status_code, reply.content) == (200, file)
        assert reply.headers["Content-Type"] == f"image/{image_format}"
        assert re.match(rf"{s3}/pictures/job-1/[0-9a-f]+\.{image_format}\?", link) and "X-Amz-Expires=604800" in link


def test_a_job_sent_again_keeps_the_first_ones_images(s3):
    """The same job id twice: the earlier links still show the earlier images."""
    target = bucket(s3)
    (first,) = handler.upload_images([b"first"], "png", target, "job-2")
    handler.upload_images([b"second"], "png", target, "job-2")
    assert requests.get(first, timeout=10).content == b"first"


def test_the_buckets_name_defaults_to_the_sdks(s3):
    """Without a name, the SDK's choice: month and year."""
    (link,) = handler.upload_images([b"x"], "png", bucket(s3, None), "job-3")
    assert f"/{time.strftime('%m-%y')}/job-3/" in link


def failure(files: list[bytes], target: handler.Bucket) -> handler.UploadFailed:
    with pytest.raises(handler.UploadFailed) as caught:
        handler.upload_images(files, "png", target, "job-4")
    error = caught.value
    for text in (str(error), repr(error), str(error.detail), repr(target)):
        assert KEY_ID not in text and SECRET not in text
    assert error.code == "UPLOAD_FAILED" and error.__cause__ is None
    return error


def test_a_missing_bucket_is_named(s3):
    """S3's own code is in the sentence."""
    assert str(failure([b"x"], bucket(s3, "not-there", create=False))) == "the bucket refused the image: NoSuchBucket"


@pytest.mark.usefixtures("enforced")
def test_refused_credentials_are_said_so(s3):
    """Credentials that the server does not know: its code, and neither of them."""
    error = failure([b"x", b"y"], bucket(s3, create=False))
    assert str(error) in (f"the bucket refused the image: {code}" for code in ("InvalidAccessKeyId", "AccessDenied"))


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [("ftp//nowhere", "pictures"), ("http://user:pw@ :1", "pictures"), ("{s3}", "A bad name!")],
)
def test_unusable_addresses_and_names(s3, endpoint, name):
    """An endpoint or bucket name that is none: what to check, in one sentence."""
    error = failure([b"x"], bucket(endpoint.format(s3=s3), name, create=False))
    assert "check the bucket's endpoint and name" in str(error) and "pw" not in str(error)


def test_an_unreachable_server_ends_soon():
    """Nobody listens: an answer within 20 s, since the job's client waits."""
    started = time.monotonic()
    assert "EndpointConnectionError" in str(failure([b"x"], bucket(f"http://127.0.0.1:{free_port()}", create=False)))
    assert time.monotonic() - started < 20


def test_a_passing_fault_is_tried_again():
    """503 twice, then the image is taken: the upload succeeds."""
    seen = []

    class Unsteady(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(body)
            self.send_response(200 if len(seen) == 3 else 503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_args) -> None:
            """Keeps the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unsteady) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        target = bucket(f"http://127.0.0.1:{server.server_port}", create=False)
        assert len(handler.upload_images([b"image"], "png", target, "job-5")) == 1
        server.shutdown()
    assert seen == [b"image"] * 3  # whole and plain: no checksum trailers around it


def test_a_refusal_without_s3s_words_is_read_too():
    """A proxy's HTML page instead of S3's XML: its status is the code."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            page = b"<html><body>Forbidden<br></html>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_args) -> None:
            """Keeps the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        error = failure([b"image"], bucket(f"http://127.0.0.1:{server.server_port}", create=False))
        server.shutdown()
    assert str(error) == "the bucket refused the image: 403"


@pytest.mark.usefixtures("enforced")
def test_the_secret_is_in_no_log(s3, caplog):
    """At DEBUG of every library, a refused upload logs no secret; at INFO not even the key's id."""
    with caplog.at_level(logging.DEBUG):
        failure([b"x"], bucket(s3, create=False))
    assert SECRET not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.INFO and KEY_ID in record.getMessage()]


# a job's own bucket

CONFIG = {"accessId": KEY_ID, "accessSecret": SECRET, "bucketName": "mine", "endpointUrl": "http://s3.invalid"}


def test_s3_config_is_read():
    """RunPod's envelope: all four pieces, or none."""
    assert handler.parse_s3_config({"s3Config": CONFIG}) == handler.Bucket("http://s3.invalid", KEY_ID, SECRET, "mine")
    assert handler.parse_s3_config({}) is None and handler.parse_s3_config({"s3Config": None}) is None


@pytest.mark.parametrize("missing", CONFIG)
@pytest.mark.parametrize("value", [None, "", " ", 5, ["x"]])
def test_a_missing_piece_is_named(missing, value):
    """No silent local folder: the missing piece is named, the others' values are not."""
    with pytest.raises(handler.UploadFailed, match=f"missing: {missing}$") as caught:
        handler.parse_s3_config({"s3Config": CONFIG | {missing: value}})
    assert SECRET not in str(caught.value) and KEY_ID not in str(caught.value)


@pytest.mark.parametrize("config", [{}, [], "http://s3.invalid", 7, True])
def test_an_s3_config_of_another_shape_is_refused(config):
    """What is no object of these four texts is UPLOAD_FAILED, too."""
    with pytest.raises(handler.UploadFailed, match="missing: endpointUrl, accessId, accessSecret, bucketName"):
        handler.parse_s3_config({"s3Config": config})


# through handler()


def test_a_jobs_images_go_to_its_bucket(pipe, s3, monkeypatch):
    """s3Config wins over BUCKET_*; the answer holds links to the same pictures that it would hold in base64."""
    bucket(s3, "mine"), bucket(s3, None)
    plain = handler.handler({"id": "a", "input": SMALL})
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET)
    worker = handler.handler({"id": "b", "input": SMALL})
    own = handler.handler({"id": "c", "input": SMALL, "s3Config": CONFIG | {"endpointUrl": s3}})
    for answer, place in ((worker, f"{time.strftime('%m-%y')}/b"), (own, "mine/c")):
        assert SECRET not in json.dumps(answer) and answer["metadata"]["image_format"] == "png"
        assert len(answer["images"]) == 2
        for link, image in zip(answer["images"], plain["images"], strict=True):
            assert link.startswith(f"{s3}/{place}/")
            stored, expected = (
                np.asarray(Image.open(io.BytesIO(data)))
                for data in (requests.get(link, timeout=10).content, base64.b64decode(image))
            )
            assert (stored == expected).all()


def test_a_bucket_takes_images_of_any_size(pipe, s3, monkeypatch):
    """MAX_RESPONSE_MB is for base64 alone: with a bucket the files stay PNGs."""
    bucket(s3, "mine")
    monkeypatch.setenv("MAX_RESPONSE_MB", "0.02")
    job = {"id": "d", "input": SMALL}
    assert handler.handler(job)["metadata"]["image_format"] == "jpeg"
    answer = handler.handler(job | {"s3Config": CONFIG | {"endpointUrl": s3}})
    assert answer["metadata"]["image_format"] == "png" and not answer["metadata"]["warnings"]


def test_a_bad_s3_config_costs_no_gpu_time(pipe):
    """UPLOAD_FAILED before anything ran."""
    ran = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_args: ran.append(1))
    answer = handler.handler({"id": "e", "input": SMALL, "s3Config": {"accessSecret": SECRET}})
    hook.remove()
    assert answer == {
        "error": "s3Config needs endpointUrl, accessId, accessSecret, bucketName as text; "
        "missing: endpointUrl, accessId, bucketName",
        "code": "UPLOAD_FAILED",
    }
    assert not ran


def test_a_refusal_is_answered_and_the_next_job_works(pipe, s3):
    """UPLOAD_FAILED with S3's code, without refresh_worker."""
    config = CONFIG | {"endpointUrl": s3, "bucketName": "never-made"}
    assert handler.handler({"id": "f", "input": SMALL, "s3Config": config}) == {
        "error": "the bucket refused the image: NoSuchBucket",
        "code": "UPLOAD_FAILED",
    }
    assert "images" in handler.handler({"id": "g", "input": SMALL})


def test_boto3s_own_environment_is_not_used(s3, monkeypatch):
    """AWS_* of the container does not replace the bucket's credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone-else")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "someone-elses")
    (link,) = handler.upload_images([b"x"], "png", bucket(s3), "job-6")
    assert KEY_ID in link and boto3.Session().get_credentials().access_key == "someone-else"
