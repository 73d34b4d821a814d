"""A weights file from an address: whole, checked, or not at all."""

from __future__ import annotations

import hashlib
import pickle
import re
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from run.files_server import FilesServer
from smolcluster.errors import ConfigError
from smolcluster.run.weights_file import (
    Checksums,
    HttpsRedirects,
    check_sha256,
    fetch_small,
    fetch_weights,
    https_opener,
    shown_url,
)

WEIGHTS = save({"x": np.arange(5000, dtype=np.float32)})
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def server() -> Iterator[FilesServer]:
    with FilesServer().running() as running:
        running.files["/m.safetensors"] = WEIGHTS
        yield running


def fetch(server: FilesServer, folder: Path, path: str = "/m.safetensors", sha256: str | None = None) -> list[str]:
    said: list[str] = []
    fetch_weights(
        server.url + path,
        folder / "model.safetensors",
        sha256=sha256,
        where="weights mine",
        checksums=Checksums(folder / "checksums.json"),
        say=said.append,
        opener=urllib.request.build_opener(HttpsRedirects()),
    )
    return said


def refused(server: FilesServer, folder: Path, path: str = "/m.safetensors", sha256: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        fetch(server, folder, path, sha256)
    assert not [*folder.glob("**/*.safetensors*")], "nothing half is left"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_is_downloaded_once_and_its_size_is_said(server: FilesServer, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    assert fetch(server, folder, sha256=SHA256) == [f"downloading {server.url}/m.safetensors, 0.0 MB"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fetch(server, folder, sha256=SHA256) == fetch(server, folder) == []
    assert server.asked == ["/m.safetensors"]


def test_another_file_than_the_published_one_is_refused(server: FilesServer, tmp_path: Path) -> None:
    text = refused(server, tmp_path, sha256="0" * 64)
    assert re.fullmatch(
        rf"http://\S+/m.safetensors is not the file .* its sha256 is {SHA256}, weights mine wants {'0' * 64}\. Try .*",
        text,
    )


def test_a_file_that_was_damaged_on_the_disk_is_downloaded_again(server: FilesServer, tmp_path: Path) -> None:
    fetch(server, tmp_path, sha256=SHA256)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert len(fetch(server, tmp_path, sha256=SHA256)) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_pickle_and_a_page_are_no_weights(server: FilesServer, tmp_path: Path) -> None:
    server.files |= {"/model.bin": pickle.dumps({"x": 1}), "/page": b"<html>not found</html>"}
    assert "Python pickles, are never loaded" in refused(server, tmp_path, "/model.bin")
    assert "no safetensors file" in refused(server, tmp_path, "/page")


def test_a_download_that_breaks_off_leaves_nothing(server: FilesServer, tmp_path: Path) -> None:
    server.lengths["/m.safetensors"] = len(WEIGHTS) + 10
    assert f"after {len(WEIGHTS)} bytes" in refused(server, tmp_path)


def test_a_file_for_which_there_is_no_room_is_not_begun(server: FilesServer, tmp_path: Path) -> None:
    server.lengths["/m.safetensors"] = 2**62
    assert "has no room" in refused(server, tmp_path)


def test_an_address_that_is_not_there_or_leads_to_http_is_one_line(server: FilesServer, tmp_path: Path) -> None:
    assert "404 Not Found" in refused(server, tmp_path, "/other")
    server.redirects["/away"] = f"{server.url}/m.safetensors?signature=secret"
    text = refused(server, tmp_path, "/away")
    assert f"redirects to {server.url}/m.safetensors, which is not https" in text
    assert server.asked[-1] == "/away"
    server.redirects["/file"] = "file:///etc/hostname"
    assert "cannot be downloaded" in refused(server, tmp_path, "/file")


def test_what_opens_addresses_otherwise_opens_https_alone(server: FilesServer, tmp_path: Path) -> None:
    for url in (f"{server.url}/m.safetensors", (tmp_path / "x").as_uri(), "https://[", "https://127.0.0.1:x/"):
        with pytest.raises((OSError, ValueError, HTTPException), match=r"unknown url type|Invalid|nonnumeric"):
            https_opener().open(url, timeout=5)
    assert server.asked == []


def test_a_folder_that_cannot_be_written_to_names_the_variable(server: FilesServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "SMOLCLUSTER_DATA" in refused(server, tmp_path / "file")


def test_a_small_file_that_is_not_there_is_none(server: FilesServer, monkeypatch: pytest.MonkeyPatch) -> None:
    opener = urllib.request.build_opener()
    assert fetch_small(f"{server.url}/config.json", opener) is None
    server.files["/config.json"] = b"{}"
    assert fetch_small(f"{server.url}/config.json", opener) == b"{}"
    monkeypatch.setattr("smolcluster.run.weights_file.MAX_SMALL_BYTES", 1)
    with pytest.raises(ConfigError, match="has more than"):
        fetch_small(f"{server.url}/config.json", opener)


def test_a_checksum_is_computed_once_for_a_file_that_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, records = tmp_path / "model.safetensors", tmp_path / "checksums.json"
    file.write_bytes(WEIGHTS)
    assert Checksums(records).of(file) == SHA256
    real = Path.open

    def opens_small(path: Path, *arguments: Any, **options: Any) -> Any:
        assert path != file, "read the file again"
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opens_small)
        check_sha256(file, SHA256, Checksums(records), "weights mine")
    file.write_bytes(WEIGHTS + b"x")
    with pytest.raises(ConfigError, match=rf"its sha256 is (?!{SHA256}).*, weights mine wants {SHA256}\. Delete it"):
        check_sha256(file, SHA256, Checksums(records), "weights mine")


@pytest.mark.parametrize("content", ["[]", "{", '{"FILE": 5}', '{"FILE": [1, 2, 3]}', "\udcff"])
def test_records_that_are_damaged_are_no_records(tmp_path: Path, content: str) -> None:
    file, records = tmp_path / "model.safetensors", tmp_path / "checksums.json"
    file.write_bytes(WEIGHTS)
    records.write_bytes(content.replace("FILE", str(file.resolve())).encode(errors="surrogateescape"))
    assert Checksums(records).of(file) == SHA256


def test_a_message_shows_no_secret_of_an_address() -> None:
    assert shown_url("https://me:word@host:1/a/m.safetensors?signature=x#y") == "https://host:1/a/m.safetensors"
