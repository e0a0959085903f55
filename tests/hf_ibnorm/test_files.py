"""Writing files whole or not at all, and hashes that tell things apart."""

import json
import os
import stat

import pytest
import torch

from hf_ibnorm import kernels
from hf_ibnorm.base.files import atomic_directory, check_new_directory, sha256, sha256_tensors, write_json, write_text
from hf_ibnorm.report.environment import environment_record, numerics_record


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "scores.json"
    write_text(target, "old")

    def no_space(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_written_files_can_be_read_by_others(tmp_path):
    write_text(tmp_path / "a", "x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    with atomic_directory(tmp_path / "done") as directory:
        (directory / "a").write_text("x")
        assert not (tmp_path / "done").exists()
    assert (tmp_path / "done" / "a").read_text() == "x"

    def fill_and_fail():
        with atomic_directory(tmp_path / "failed") as directory:
            (directory / "a").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill_and_fail()
    with pytest.raises(FileExistsError, match="done is not empty"), atomic_directory(tmp_path / "done"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_what_a_killed_process_left_is_removed_and_what_another_is_filling_stays(tmp_path):
    (tmp_path / ".done.abcd1234").mkdir()
    (tmp_path / ".done.abcd1234" / "half").write_text("x")
    (tmp_path / ".done.notes").mkdir()
    (tmp_path / ".done-2.abcd1234").mkdir()

    def two_at_once():
        with atomic_directory(tmp_path / "done") as one, atomic_directory(tmp_path / "done") as other:
            assert one.is_dir()
            (other / "a").write_text("x")

    with pytest.raises(FileExistsError):
        two_at_once()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".done-2.abcd1234", ".done.notes", "done"]


def test_hashes_tell_parts_names_shapes_and_dtypes_apart():
    assert sha256(["ab", "c"]) != sha256(["a", "bc"])
    x = torch.arange(6.0)
    hashes = {
        sha256_tensors([("w", x)]),
        sha256_tensors([("v", x)]),
        sha256_tensors([("w", x.view(2, 3))]),
        sha256_tensors([("w", x.to(torch.bfloat16))]),
        sha256_tensors([("w", -x)]),
    }
    assert len(hashes) == 5
    assert sha256_tensors([("w", x.view(2, 3).t().contiguous().t())]) == sha256_tensors([("w", x.view(2, 3))])


def test_a_new_directory_is_checked_without_being_made(tmp_path):
    check_new_directory("run_dir", tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="run_dir: .*full is not empty"):
        check_new_directory("run_dir", tmp_path / "full")
    with pytest.raises(NotADirectoryError, match="is no directory"):
        check_new_directory("run_dir", tmp_path / "full" / "x")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NotADirectoryError, match="is no directory"):
        check_new_directory("run_dir", tmp_path / "dangling")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        check_new_directory("run_dir", tmp_path / "full" / "x" / "y")


def test_environment_record_is_json_and_names_the_versions():
    record = json.loads(json.dumps(environment_record()))
    assert record["versions"]["torch"] == torch.__version__
    assert record["norm_backend"]["cpu"].startswith(("fused (C++", "reference ("))


def test_the_numerics_of_a_run_name_the_build_of_the_kernels_but_not_why_there_are_none(monkeypatch, tmp_path):
    if kernels.lacking("cpu") is None:
        assert numerics_record()["norm_backend"] == kernels.describe("cpu")
    with monkeypatch.context() as patched:
        patched.setenv("HF_IBNORM_KERNELS", str(tmp_path))
        kernels.forget()
        assert kernels.describe("cpu").startswith("reference (not built")
        assert numerics_record()["norm_backend"] == "reference"
    kernels.forget()
