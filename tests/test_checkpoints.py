"""Checkpoints: what is saved comes back, and whatever is not a checkpoint is refused with what to do next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import checkpoints
import genre_detector
from checkpoints import fill_network, load_checkpoint, save_checkpoint
from common import UserError
from extract_features import FEATURE_SETTINGS
from extract_model_features import load_members
from files import file_sha256
from train_fusion import load_fusion

MAKER = "train_dpa_cnn.py"


def save(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    tensors = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "half": torch.tensor([1.5]).half(),
        "turned": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "count": torch.tensor(7),
    }
    meta = {"genres": ["blues", "jazz"], "temperature": 0.7, "nothing": None}
    save_checkpoint(path, tensors, meta)
    return tensors, meta


def refused(path: Path) -> str:
    """The refusal of a checkpoint, which must name the file and the script to run."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, MAKER)
    message = str(caught.value)
    assert str(path) in message
    assert f"run {MAKER}" in message
    return message


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    tensors, meta = save(path)
    loaded, found = load_checkpoint(path, MAKER)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert meta.items() <= found.items()
    assert found["feature_settings"] == FEATURE_SETTINGS
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(path, {"weight": torch.zeros(1)}, {"not": object()})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_absent_and_folder_are_refused(tmp_path):
    assert "is not there" in refused(tmp_path / "model.safetensors")
    refused(tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True))
def test_truncated_is_refused(tmp_path, part):
    path = tmp_path / "model.safetensors"
    save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    refused(path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_other_bytes_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path)


class Innocent(dict):
    """Would leave a file behind if unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for legacy in (False, True):
        torch.save(Innocent(), "model.safetensors", _use_new_zipfile_serialization=not legacy)
        refused(Path("model.safetensors"))
        assert not Path("ran").exists()


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"music_genre_fusion": "no json"}])
def test_safetensors_of_someone_else_are_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    refused(path)


@pytest.mark.parametrize("record", ["[]", "3", "null", "{}"])
def test_a_record_that_is_no_record_is_refused(tmp_path, record):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"music_genre_fusion": record})
    refused(path)


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    monkeypatch.setattr(checkpoints, "CHECKPOINT_FORMAT", 3)
    save(path)
    monkeypatch.undo()
    assert "format 3" in refused(path)


@pytest.mark.parametrize("change", [{"n_mels": 96}, {"new": 1}, {"version": 0, "top_db": 60.0}])
def test_other_feature_settings_are_refused(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"weight": torch.zeros(2)}, {"feature_settings": FEATURE_SETTINGS | change})
    message = refused(path)
    assert all(name in message for name in change)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_is_noticed(tmp_path, data):
    path = tmp_path / "model.safetensors"
    save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    refused(path)


def test_the_sum_is_of_tensors_and_record(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path)
    with safe_open(path, "pt") as file:
        texts, tensors = (
            file.metadata(),
            {name: file.get_tensor(name) for name in ("weight", "half", "turned", "count")},
        )
    save_file(tensors, path, metadata=texts)
    load_checkpoint(path, MAKER)
    save_file(tensors | {"weight": tensors["weight"].flip(0).contiguous()}, path, metadata=texts)
    assert "SHA-256" in refused(path)
    save_file(tensors, path, metadata=texts | {"music_genre_fusion": texts["music_genre_fusion"].replace("0.7", "0.8")})
    assert "SHA-256" in refused(path)
    save_file(tensors, path, metadata={"music_genre_fusion": texts["music_genre_fusion"]})
    assert "sha256" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"good": torch.ones(2), "bad": torch.tensor([1.0, value]).to(dtype)}, {})
    assert "bad holds NaN or infinity" in refused(path)


def test_a_deeply_nested_record_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"music_genre_fusion": "[" * 100_000})
    refused(path)


def test_weights_of_any_precision_fill_a_network():
    network = torch.nn.BatchNorm1d(3)
    saved = {
        name: value.half() if value.is_floating_point() else value + 5 for name, value in network.state_dict().items()
    }
    saved["weight"] += 0.5
    fill_network(network, saved, Path("there"))
    assert network.weight.tolist() == [1.5] * 3
    assert network.weight.dtype == torch.float32
    assert network.num_batches_tracked == 5


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(2, 9), "bias": torch.zeros(2)},
        {"weight": torch.zeros(2, 3)},
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
        {"weight": torch.zeros(2, 3, dtype=torch.int64), "bias": torch.zeros(2)},
        {"weight": torch.zeros(2, 3, dtype=torch.complex64), "bias": torch.zeros(2)},
    ],
    ids=["shape", "missing", "unknown", "whole numbers", "complex"],
)
def test_wrong_shapes_names_and_kinds_are_refused(tensors):
    with pytest.raises(UserError, match=r"models/dpa_cnn.* doesn't fit the network .*: train it again") as caught:
        fill_network(torch.nn.Linear(3, 2), tensors, Path("models/dpa_cnn"))
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- the released set of four


def test_the_released_files_are_those_of_the_list(models):
    """As ``cd models && sha256sum --check SHA256SUMS`` does."""
    listed = dict(reversed(line.split("  ")) for line in (models / "SHA256SUMS").read_text().splitlines())
    found = {path.relative_to(models).as_posix(): file_sha256(path) for path in models.glob("*/model.safetensors")}
    assert found == listed, "released anew? cd models && sha256sum */model.safetensors > SHA256SUMS"


def load_from(models: Path) -> None:
    from genre_detector import GenreDetector

    GenreDetector("fusion", models)


def test_fusion_is_refused_when_a_member_has_changed(pipeline, tmp_path):
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    load_from(models)
    path = models / "ecas_cnn" / "model.safetensors"
    tensors, meta = load_checkpoint(pipeline.models / "ecas_cnn" / "model.safetensors", MAKER)
    save_checkpoint(path, tensors, meta | {"seed": 1})
    with pytest.raises(UserError, match=r"another ecas_cnn: run extract_model_features"):
        load_from(models)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0), ("temperature", float("nan")), ("temperature", "1"), ("genres", "blues"), ("genres", None),
        ("genres", ["a", "a"]), ("split", "artist"), ("min_confidence", 7), ("min_confidence", None),
        ("settings.width", 1e9),
        ("settings.width", -1), ("settings.width", float("inf")), ("settings.window", 10**9), ("settings.window", 6.5),
        ("settings.rhythm", 2), ("settings.overlap", 1), ("settings.features", "../../etc"), ("settings", None),
    ],
)  # fmt: skip
def test_what_a_checkpoint_claims_is_checked(pipeline, tmp_path, key, value):
    """Among it a width whose network would need terabytes."""
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    path = models / "ecas_cnn" / "model.safetensors"
    tensors, meta = load_checkpoint(path, MAKER)
    place, _, name = key.rpartition(".")
    (meta[place] if place else meta)[name] = value
    save_checkpoint(path, tensors, meta)
    with pytest.raises(UserError, match=r"ecas_cnn.*(train it again|differs from)") as caught:
        load_members(models, ["ecas_cnn"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1), ("temperature", None), ("members", 3), ("members", ["a", "b", "c"]),
        ("min_confidence", "x"), ("min_confidence", None), ("genres", []),
    ],
)  # fmt: skip
def test_what_a_fusion_claims_is_checked(models, tmp_path, key, value):
    tensors, meta = load_checkpoint(models / "fusion_progressive" / "model.safetensors", MAKER)
    save_checkpoint(tmp_path / "fusion_progressive" / "model.safetensors", tensors, meta | {key: value})
    with pytest.raises(UserError, match=r"fusion_progressive.*run train_fusion\.py again"):
        load_fusion(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("coefficients", torch.Tensor.int), ("coefficients", lambda values: values.to(torch.complex64)),
        ("coefficients", torch.Tensor.double), ("coefficients", lambda values: values[:-1].contiguous()),
        ("intercept", torch.Tensor.bfloat16), ("intercept", lambda values: values[None]),
        ("kept", torch.Tensor.float), ("kept", lambda values: values[:, None]), ("kept", lambda _: torch.tensor([-1])),
    ],
)  # fmt: skip
def test_a_fusion_of_other_shapes_and_types_is_refused(models, tmp_path, name, change):
    tensors, meta = load_checkpoint(models / "fusion_progressive" / "model.safetensors", MAKER)
    save_checkpoint(
        tmp_path / "fusion_progressive" / "model.safetensors", tensors | {name: change(tensors[name])}, meta
    )
    with pytest.raises(UserError, match=r"fusion_progressive.*run train_fusion\.py again") as caught:
        load_fusion(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_weights_too_large_to_reckon_with_are_no_answer(models, tmp_path, repo, capsys):
    tensors, meta = load_checkpoint(models / "cnn_bigru" / "model.safetensors", MAKER)
    large = {name: t.float() * 1e30 if t.is_floating_point() else t for name, t in tensors.items()}
    save_checkpoint(tmp_path / "cnn_bigru" / "model.safetensors", large, meta)
    options = ["--models", str(tmp_path), "--model", "cnn_bigru", "--device", "cpu", "--duration", "7", "--json"]
    assert genre_detector.main([*options, str(repo / "examples" / "demo_song.ogg")]) == 1
    captured = capsys.readouterr()
    assert "cnn_bigru answers with NaN or infinity: train it again with train_bigru_cnn.py" in captured.err
    assert captured.err.count("\n") == 1
    assert json.loads(captured.out) == []


def test_a_fusion_of_features_that_are_not_there_is_refused(pipeline, tmp_path):
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    path = models / "fusion_progressive" / "model.safetensors"
    meta = load_checkpoint(path, MAKER)[1]
    tensors = {"coefficients": torch.zeros(2, 10), "intercept": torch.zeros(10), "kept": torch.tensor([5, 896])}
    save_checkpoint(path, tensors, meta | {"kind": "features"})
    with pytest.raises(UserError, match=r"run train_fusion\.py again"):
        load_from(models)


def test_members_of_different_training_are_refused(pipeline, tmp_path):
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    path = models / "dpa_cnn" / "model.safetensors"
    tensors, meta = load_checkpoint(path, MAKER)
    save_checkpoint(path, tensors, meta | {"split": {"name": "another"}})
    with pytest.raises(UserError, match="dpa_cnn"):
        load_from(models)


def test_each_absent_checkpoint_is_named_with_its_script(pipeline, tmp_path):
    for folder, script in {
        "cnn_bigru": "train_bigru_cnn.py",
        "dpa_cnn": "train_dpa_cnn.py",
        "ecas_cnn": "train_ecas_cnn.py",
        "fusion_progressive": "train_fusion.py",
    }.items():
        models = shutil.copytree(pipeline.models, tmp_path / folder)
        (models / folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=f"{folder}.*run {script} first"):
            load_from(models)


def test_a_network_of_other_strides_is_refused(pipeline, tmp_path):
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    path = models / "dpa_cnn" / "model.safetensors"
    tensors, meta = load_checkpoint(path, MAKER)
    save_checkpoint(path, tensors, meta | {"strides": meta["strides"] | {"blocks.0": [2, 2]}})
    with pytest.raises(UserError, match=r"dpa_cnn.*strides.*train_dpa_cnn\.py"):
        load_from(models)
