"""A pickle in every place where a file is read: refused in words, or harmless, and never executed."""

import ast
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import joblib
import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorType  # registered with Arrow, as in every job

from passreid_ray.config.load import read_preset
from passreid_ray.data import BadImage, Source, open_rows
from passreid_ray.data.feature_files import read_features
from passreid_ray.data.folder import FolderSource
from passreid_ray.data.labels_csv import LabelsCsvSource
from passreid_ray.data.lmdb_source import LmdbSource
from passreid_ray.data.manifest import parse_sidecar
from passreid_ray.data.msmt17 import MSMT17Source
from passreid_ray.data.pack_folder import claim
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.data.tar_source import TarSource
from passreid_ray.data.zip_source import ZipSource
from passreid_ray.engines import pack, synthesize, tune
from passreid_ray.engines.loading import LoadConfig, load_model
from passreid_ray.engines.run_folder import RAY_SNAPSHOT, prepare
from passreid_ray.engines.tune_book import TrialBook
from passreid_ray.engines.tune_searcher import Keeper, SweepSearcher
from passreid_ray.errors import UserError
from passreid_ray.models import load_backbone, read_state
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import META_FILE, TENSORS_FILE, checkpoint_name, load_state, save_state
from tests.data.pictures import encoded, gradient
from tests.engines.micro import micro_config
from tests.engines.sweep_micro import sweep_plan

REPOSITORY = Path(__file__).parents[1]


class Attack:
    """Unpickling it makes a folder."""

    def __init__(self, witness: Path) -> None:
        self.witness = str(witness)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (self.witness,)


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """What is there when an attack has been executed."""
    return tmp_path / "executed"


@pytest.fixture
def attack(witness: Path) -> Attack:
    return Attack(witness)


def _objects(attack: Attack) -> pa.Array:
    """A column of pickled objects, of a type that Ray Data registers."""
    return ArrowPythonObjectArray.from_objects([attack, attack])


def _list_of(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)


def _of_pickled_shape(folder: Path, column: str, others: dict[str, Any], attack: Attack) -> Path:
    """A Parquet file whose ``column`` is a tensor whose shape is a pickle, as files of Ray 2.49 to 2.54 have it."""
    storage = _list_of(pa.array([1.0, 2.0]))
    metadata = {
        b"ARROW:extension:name": ArrowTensorType((1,), pa.float64()).extension_name.encode(),
        b"ARROW:extension:metadata": pickle.dumps(attack),
    }
    fields = [pa.field(column, storage.type, metadata=metadata)]
    fields += [pa.field(name, pa.array(values).type) for name, values in others.items()]
    path = folder / "a.parquet"
    pq.write_table(pa.table([storage, *map(pa.array, others.values())], schema=pa.schema(fields)), path)
    return path


def _parquet(folder: Path, columns: dict[str, Any]) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def _file(folder: Path, name: str, attack: Attack) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(attack))
    return path


def test_the_attacks_are_live(tmp_path: Path, witness: Path, attack: Attack) -> None:
    def is_executed(unpickle: Callable[[], object]) -> bool:
        unpickle()
        is_there = witness.is_dir()
        witness.rmdir()
        return is_there

    torch.save(attack, tmp_path / "a.pth")
    np.save(tmp_path / "a.npy", np.array([attack], object))
    joblib.dump(attack, tmp_path / "a.joblib")
    assert is_executed(lambda: pickle.loads(pickle.dumps(attack)))
    assert is_executed(lambda: torch.load(tmp_path / "a.pth", weights_only=False))
    assert is_executed(lambda: np.load(tmp_path / "a.npy", allow_pickle=True))
    assert is_executed(lambda: joblib.load(tmp_path / "a.joblib"))
    one = ArrowPythonObjectArray.from_objects([attack])
    assert is_executed(lambda: one[0].as_py())
    assert is_executed(lambda: _list_of(_objects(attack)).slice(0, 1).flatten().to_numpy(zero_copy_only=False))


# -- checkpoints of other projects


def _zipped_torch(folder: Path, attack: Attack) -> Path:
    torch.save({"model": attack}, folder / "a.pth")
    return folder / "a.pth"


def _plain_torch(folder: Path, attack: Attack) -> Path:
    torch.save({"model": attack}, folder / "a.pth", _use_new_zipfile_serialization=False)
    return folder / "a.pth"


def _script(folder: Path, attack: Attack) -> Path:
    """A TorchScript archive, of which the pickle with the constants is replaced."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "whole.pt")
    with zipfile.ZipFile(folder / "whole.pt") as whole, zipfile.ZipFile(folder / "a.pth", "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, pickle.dumps(attack) if name.endswith(".pkl") else whole.read(name))
    return folder / "a.pth"


def _old_tar(folder: Path, attack: Attack) -> Path:
    with tarfile.open(folder / "a.pth.tar", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(pickle.dumps(attack))
            archive.addfile(member, io.BytesIO(pickle.dumps(attack)))
    return folder / "a.pth.tar"


def _joblib(folder: Path, attack: Attack) -> Path:
    joblib.dump(attack, folder / "a.bin")
    return folder / "a.bin"


CHECKPOINTS: dict[str, Callable[[Path, Attack], Path]] = {
    "torch file": _zipped_torch,
    "torch file, old": _plain_torch,
    "torch file, oldest": _old_tar,
    "TorchScript": _script,
    "pickle": lambda folder, attack: _file(folder, "a.pth", attack),
    "pickle named safetensors": lambda folder, attack: _file(folder, "a.safetensors", attack),
    "joblib": _joblib,
}


@pytest.mark.parametrize("write", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_pickle_as_a_checkpoint_is_refused(
    tmp_path: Path, witness: Path, attack: Attack, write: Callable[[Path, Attack], Path]
) -> None:
    path = write(tmp_path, attack)
    model: Any = torch.nn.Identity()
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_state(path),
        lambda: load_backbone(model, path),
        lambda: load_model(LoadConfig(checkpoint=path), "cat"),
    )
    for read in readers:
        with pytest.raises(UserError, match=path.name):
            read()
    assert not witness.exists()


# -- what a run reads of its own


def _own_description(folder: Path, attack: Attack) -> None:
    _file(folder, META_FILE, attack)
    load_state(folder)


def _own_tensors(folder: Path, attack: Attack) -> None:
    """The attacker has corrected size and checksum too."""
    save_state(folder, {"a": torch.zeros(2)}, {"step": 1})
    content = pickle.dumps(attack)
    meta = json.loads((folder / META_FILE).read_bytes())
    meta["files"][TENSORS_FILE] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (folder / META_FILE).write_text(json.dumps(meta))
    _file(folder, TENSORS_FILE, attack)
    load_state(folder)


def _newest_checkpoint(folder: Path, attack: Attack) -> None:
    config = micro_config(folder)
    _file(folder, f"{config.run.name}/{checkpoint_name(3)}/{META_FILE}", attack)
    prepare(config.run, config, (), "fingerprint")


def _trial(folder: Path, attack: Attack) -> None:
    _file(folder, "0/trial.json", attack)
    TrialBook(folder)


def _searcher(folder: Path, attack: Attack) -> None:
    SweepSearcher(Keeper(sweep_plan(folder))).restore(str(_file(folder, "searcher-state.pkl", attack)))


def _clock(folder: Path, attack: Attack) -> None:
    tune._read_seconds(_file(folder, "seconds.json", attack))


def _sweep_settings(folder: Path, attack: Attack) -> None:
    plan = sweep_plan(folder)
    _file(plan.config.run.folder, "config.toml", attack)
    _file(plan.trials_folder, "0/trial.json", attack)
    tune.check_continues(plan)


def _preset(folder: Path, attack: Attack) -> None:
    read_preset(str(_file(folder, "a.toml", attack)))


def _synthetic_mark(folder: Path, attack: Attack) -> None:
    _file(folder, synthesize.MARKER, attack)
    synthesize._claim(folder, "settings")


# -- caches of packing


def _pack_claim(folder: Path, attack: Attack) -> None:
    _file(folder, "pack.json", attack)
    claim(folder, "fingerprint", {})


def _repeats(folder: Path, content: bytes) -> None:
    own = claim(folder / "packed", "fingerprint", {})
    own.write(pack.DUPLICATES_FILE, content)
    config = pack.PackConfig(drop_duplicates=True)
    pack.found_repeats(config, own, None, 10, lambda *_: None)  # pyright: ignore[reportArgumentType]


def _repeats_of_objects(folder: Path, attack: Attack) -> None:
    file = io.BytesIO()
    np.save(file, np.array([[attack, attack]], object))
    _repeats(folder, file.getvalue())


def _repeats_as_pickle(folder: Path, attack: Attack) -> None:
    _repeats(folder, pickle.dumps(attack))


def _repeats_as_npz(folder: Path, attack: Attack) -> None:
    file = io.BytesIO()
    np.savez(file, a=np.array([attack], object))
    _repeats(folder, file.getvalue())


def _manifest(folder: Path, attack: Attack) -> None:
    _parquet(folder, {"image_id": ["a"], "image": [b"b"]})
    _file(folder, "manifest.json", attack)
    open_rows(ParquetSource(path=folder))


# -- features

IDS = ["a", "b"]
FEATURES = [[1.0], [2.0]]


def _feature_file(folder: Path, attack: Attack) -> None:
    read_features(str(_file(folder, "a.parquet", attack)))


def _feature_ids(folder: Path, attack: Attack) -> None:
    read_features(str(_parquet(folder, {"image_id": _objects(attack), "feature": FEATURES})))


def _feature_reasons(folder: Path, attack: Attack) -> None:
    read_features(str(_parquet(folder, {"image_id": IDS, "feature": FEATURES, "reason": _objects(attack)})))


def _feature_lists(folder: Path, attack: Attack) -> None:
    read_features(str(_parquet(folder, {"image_id": IDS, "feature": _list_of(_objects(attack))})))


def _feature_bytes(folder: Path, attack: Attack) -> None:
    data = pickle.dumps(attack)
    read_features(str(_parquet(folder, {"image_id": IDS, "feature": [[data], [data]]})))


def _feature_tensor(folder: Path, attack: Attack) -> None:
    read_features(str(_of_pickled_shape(folder, "feature", {"image_id": IDS}, attack)))


# -- data

IMAGE = encoded(gradient())


def _packed_file(folder: Path, attack: Attack) -> None:
    open_rows(ParquetSource(path=_file(folder, "a.parquet", attack)))


def _packed_ids(folder: Path, attack: Attack) -> None:
    open_rows(ParquetSource(path=_parquet(folder, {"image_id": _objects(attack), "image": [IMAGE, IMAGE]})))


def _packed_people(folder: Path, attack: Attack) -> None:
    people = pa.DictionaryArray.from_arrays(pa.array([0, 1]), _objects(attack).storage)
    columns = {"image_id": IDS, "image": [IMAGE, IMAGE], "person_id": _objects(attack), "camera_id": people}
    open_rows(ParquetSource(path=_parquet(folder, columns)))


def _packed_images(folder: Path, attack: Attack) -> None:
    open_rows(ParquetSource(path=_parquet(folder, {"image_id": IDS, "image": _objects(attack)})))


def _packed_structs(folder: Path, attack: Attack) -> None:
    images = pa.StructArray.from_arrays([_objects(attack)], ["bytes"])
    open_rows(ParquetSource(path=_parquet(folder, {"image_id": IDS, "image": images})))


def _packed_tensor(folder: Path, attack: Attack) -> None:
    open_rows(ParquetSource(path=_of_pickled_shape(folder, "image", {"image_id": IDS}, attack)))


def _packed_later(folder: Path, attack: Attack) -> None:
    """The file is replaced after it was listed."""
    rows = open_rows(ParquetSource(path=_parquet(folder, {"image_id": IDS, "image": [IMAGE, IMAGE]})))
    _parquet(folder, {"image_id": IDS, "image": _objects(attack)})
    rows.image_bytes(0)


def _labels(folder: Path, attack: Attack) -> None:
    _file(folder, "labels.csv", attack)
    open_rows(LabelsCsvSource(root=folder))


def _list_of_msmt17(folder: Path, attack: Attack) -> None:
    (folder / "train").mkdir()
    _file(folder, "list_train.txt", attack)
    open_rows(MSMT17Source(root=folder, splits=["train"]))


def _tar(folder: Path, attack: Attack) -> None:
    open_rows(TarSource(path=_file(folder, "a.tar", attack)))


def _sidecar(folder: Path, attack: Attack) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, content in {"a.jpg": IMAGE, "a.json": pickle.dumps(attack)}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    open_rows(TarSource(path=folder / "a.tar"))


def _zip(folder: Path, attack: Attack) -> None:
    open_rows(ZipSource(path=_file(folder, "a.zip", attack)))


def _lmdb(folder: Path, attack: Attack) -> None:
    open_rows(LmdbSource(path=_file(folder, "lmdb/data.mdb", attack).parent))


REFUSED: dict[str, Callable[[Path, Attack], None]] = {
    "checkpoint: state.json": _own_description,
    "checkpoint: state.safetensors with its checksum": _own_tensors,
    "run: newest checkpoint": _newest_checkpoint,
    "sweep: trial.json": _trial,
    "sweep: state of the searcher": _searcher,
    "sweep: seconds.json": _clock,
    "sweep: config.toml": _sweep_settings,
    "preset": _preset,
    "synthetic set: mark": _synthetic_mark,
    "packing: pack.json": _pack_claim,
    "packing: manifest.json": _manifest,
    "packing: duplicates.npy": _repeats_as_pickle,
    "packing: duplicates.npy of objects": _repeats_of_objects,
    "packing: duplicates.npy is an npz": _repeats_as_npz,
    "features: the file": _feature_file,
    "features: image_id": _feature_ids,
    "features: reason": _feature_reasons,
    "features: list of objects": _feature_lists,
    "features: list of bytes": _feature_bytes,
    "features: tensor with a pickled shape": _feature_tensor,
    "Parquet: the file": _packed_file,
    "Parquet: image_id": _packed_ids,
    "Parquet: person_id": _packed_people,
    "Parquet: image": _packed_images,
    "Parquet: image in a struct": _packed_structs,
    "Parquet: tensor with a pickled shape": _packed_tensor,
    "Parquet: replaced later": _packed_later,
    "labels.csv": _labels,
    "list of MSMT17": _list_of_msmt17,
    "tar": _tar,
    "tar: sidecar": _sidecar,
    "zip": _zip,
    "LMDB": _lmdb,
}


@pytest.mark.parametrize("read", REFUSED.values(), ids=REFUSED)
def test_a_pickle_in_place_of_a_file_or_a_column_is_refused(
    tmp_path: Path, witness: Path, attack: Attack, read: Callable[[Path, Attack], None]
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    with pytest.raises(UserError) as told:
        read(folder, attack)
    assert str(folder) in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    assert not witness.exists()


# -- places where a pickle is passed over


def _in_a_folder(folder: Path, data: bytes) -> Source:
    (folder / "a.jpg").write_bytes(data)
    return FolderSource(root=folder)


def _in_a_tar(folder: Path, data: bytes) -> Source:
    with tarfile.open(folder / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return TarSource(path=folder / "a.tar")


def _in_a_zip(folder: Path, data: bytes) -> Source:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.jpg", data)
    return ZipSource(path=folder / "a.zip")


def _in_parquet(folder: Path, data: bytes) -> Source:
    return ParquetSource(path=_parquet(folder, {"image_id": ["a"], "image": [data]}))


def _in_lmdb(folder: Path, data: bytes) -> Source:
    with lmdb.open(str(folder / "a"), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"__keys__", data)  # LUPerson has a pickled list under it
        transaction.put(b"a", b"\xff\xd8\xff" + data)  # begins like a JPEG
    return LmdbSource(path=folder / "a")


@pytest.mark.parametrize("write", [_in_a_folder, _in_a_tar, _in_a_zip, _in_parquet, _in_lmdb])
def test_a_pickle_in_place_of_an_image_is_a_bad_image(
    tmp_path: Path, witness: Path, attack: Attack, write: Callable[[Path, bytes], Source]
) -> None:
    rows = open_rows(write(tmp_path, pickle.dumps(attack)))
    assert len(rows) == 1
    with pytest.raises(BadImage):
        rows.image(0)
    assert not witness.exists()


def test_a_pickle_in_place_of_rays_list_of_checkpoints_is_removed(
    tmp_path: Path, witness: Path, attack: Attack
) -> None:
    config = micro_config(tmp_path)
    snapshot = _file(tmp_path, f"{config.run.name}/{RAY_SNAPSHOT}", attack)
    prepare(config.run, config, (), "fingerprint")
    assert not snapshot.exists()
    assert not witness.exists()


def test_a_pickle_among_the_records_of_a_run_is_passed_over(tmp_path: Path, witness: Path, attack: Attack) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + pickle.dumps(attack) + b'\n[1]\n{"step": 2}\n')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    assert not witness.exists()


def test_a_pickle_in_place_of_what_is_known_of_a_shard_counts_as_nothing(
    tmp_path: Path, witness: Path, attack: Attack
) -> None:
    assert parse_sidecar(pickle.dumps(attack)) is None
    assert not witness.exists()


# -- and nobody adds another place
# -- and nobody adds another place

UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pandas", "yaml"}


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _is_given(call: ast.Call, name: str, value: object) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is value
        for word in call.keywords
    )


def _unpickles(name: str, call: ast.Call) -> bool:
    match name:
        case "torch.load":
            return not _is_given(call, "weights_only", True)
        case "np.load" | "np.lib.format.read_array":
            return not _is_given(call, "allow_pickle", False)
        case "eval" | "exec" | "torch.jit.load" | "torch.hub.load" | "faiss.read_index":
            return True
        case _:
            module, _, function = name.rpartition(".")
            return module.split(".")[-1] in UNPICKLING and function.startswith(("load", "read", "Unpickler", "open"))


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path)", True),
        ("pickle.loads(data)", True),
        ("ray.cloudpickle.load(file)", True),
        ("pandas.read_pickle(path)", True),
        ("json.loads(text)", False),
    ],
)
def test_the_search_for_unpickling_finds_it(code: str, is_found: bool) -> None:
    assert any(_unpickles(name, call) for name, call in _calls(ast.parse(code))) is is_found


def test_no_code_of_the_package_or_the_jobs_unpickles_a_file() -> None:
    files = [path for folder in ("passreid_ray", "jobs") for path in (REPOSITORY / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(REPOSITORY)}:{call.lineno}: {name}"
        for path in files
        for name, call in _calls(ast.parse(path.read_text(encoding="utf-8")))
        if _unpickles(name, call)
    ]
    assert len(files) > 200
    assert found == []
