import logging
import os

import pytest

from gem_ray import cache
from gem_ray.cache import cache_folder, staged


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """A home and a temporary folder of the test's own; nothing names another place."""
    for name in ("GEM_RAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    cache._warn_once.cache_clear()


def test_it_is_in_the_home_or_where_a_variable_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "home" / ".cache" / "gem-ray"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gem-ray"
    monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_only_its_user_can_write_to_it_whatever_the_mask(mask):
    before = os.umask(mask)
    try:
        assert cache_folder().stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def _foreign(folder, monkeypatch):
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)


def _writable(folder, monkeypatch):
    folder.chmod(0o777)


def _link_of_another(folder, monkeypatch):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    if os.geteuid() != 0:
        pytest.skip("only root can give a link away")
    os.lchown(folder, 12345, 12345)


@pytest.mark.parametrize("spoil", [_foreign, _writable, _link_of_another])
@pytest.mark.parametrize("place", ["named", "home", "temporary"])
def test_a_folder_in_which_others_can_plant_models_is_refused(monkeypatch, tmp_path, spoil, place):
    if place == "named":
        monkeypatch.setenv("GEM_RAY_CACHE", str(tmp_path / "named"))
    if place == "temporary":
        monkeypatch.setenv("HOME", "/proc/nobody")
    folder = cache_folder()
    model = staged("key", "model", lambda target: target.write_text("ours"))
    spoil(folder, monkeypatch)
    if place == "temporary" and spoil is _foreign:  # the name holds the user
        folder = folder.rename(folder.with_name(f"gem-ray-{os.geteuid()}"))
    with pytest.raises(PermissionError, match=r"could put anything there.*GEM_RAY_CACHE") as caught:
        staged("key", "model", lambda target: target.write_text("theirs"))
    assert str(folder) in str(caught.value)
    assert model.name == "model"


@pytest.mark.parametrize("home", ["/proc/nobody", None])
def test_without_a_home_it_is_a_private_folder_and_that_is_said_once(monkeypatch, tmp_path, caplog, home):
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pathlib.Path.home", _no_home)
    else:
        monkeypatch.setenv("HOME", home)
    with caplog.at_level(logging.WARNING):
        folder = cache_folder()
        assert cache_folder() == folder
    assert folder == tmp_path / "tmp" / f"gem-ray-{os.geteuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (message,) = caplog.messages
    assert str(folder) in message
    assert "GEM_RAY_CACHE" in message


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_named_folder_that_cannot_be_written_is_an_error(monkeypatch):
    monkeypatch.setenv("GEM_RAY_CACHE", "/proc/nobody/cache")
    with pytest.raises(PermissionError, match="/proc/nobody/cache"):
        cache_folder()


def test_compiled_code_is_not_in_a_folder_that_anyone_can_make_first(monkeypatch, tmp_path):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ, VLLM_CACHE_ROOT="/named/by/the/user"))
    cache.keep_compiled_code_private()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder() / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(cache_folder() / "triton")
    assert os.environ["VLLM_CACHE_ROOT"] == "/named/by/the/user"
