"""Clusters of any data or feature file, without training: features -> neighbours -> Jaccard distance -> labels.

Reads from top to bottom in the order it runs: settings, ``run``, features, what is written.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console

from passreid_ray.config import UserPath, to_toml
from passreid_ray.data import Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.feature_files import FeatureFiles, Features, read_features
from passreid_ray.engines.cluster_picture import write_cluster_picture
from passreid_ray.engines.clustering import ClusterConfig, PseudoLabels, cluster_features, object_store_bytes
from passreid_ray.engines.features import FeatureConfig, extract
from passreid_ray.engines.loading import Loaded, load_model
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.run_folder import CONFIG_FILE, check_writable
from passreid_ray.errors import UserError
from passreid_ray.models.fusion import Fusion
from passreid_ray.retrieval.dbscan import OUTLIER

LABELS_FILE = "labels.parquet"
HEALTH_FILE = "health.json"


class PseudoLabelsConfig(FeatureConfig):
    """Everything a clustering is made of."""

    output: UserPath = Path("outputs/cluster")
    """Folder for labels.parquet, health.json, clusters.png and the features."""
    features: str | None = None
    """Parquet file or folder with columns image_id and feature, here or in a bucket; none: computed from data."""
    data: Source | None = None
    """Crops; with a feature file only looked at for the picture. none: synthetic people, or the feature file alone."""
    fusion: Fusion = "cat"
    """Feature: cls, parts (mean of part tokens), cat (both side by side) or mean (of both)."""
    batch_size: int = Field(default=64, ge=1)
    """Images per forward pass of one process."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""
    cluster: ClusterConfig = ClusterConfig()


def run(config: PseudoLabelsConfig, console: Console | None = None) -> PseudoLabels:
    """Cluster as ``config`` says and write labels; features that are there from a stopped run are used again."""
    console = console or Console(highlight=False, soft_wrap=True)
    rows = open_rows(config.data) if config.data is not None else None
    if config.features is None:
        rows = rows or open_rows(SyntheticSource())
        check_readable(rows, config.max_bad_share)
        loaded = load_model(config, config.fusion)
        check_writable(config.output, "output")
        connect(WorkersConfig(), object_store_bytes(len(rows), loaded.model.feature_width))
        console.print(f"{len(rows):,} images; {loaded.notes}")
    else:
        loaded = None
        check_writable(config.output, "output")
    (config.output / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    with PhaseLines(console) as progress:
        if loaded is not None:
            assert rows is not None
            features = computed_features(config, rows, loaded, progress)
        else:
            features = given_features(config, rows)
            connect(WorkersConfig(), object_store_bytes(*features.features_ND.shape))
            console.print(f"{len(features.image_ids):,} features from {config.features}")
        used = np.flatnonzero(features.usable_N)
        found = cluster_features(
            features.features_ND if features.usable_N.all() else features.features_ND[used],
            config.cluster,
            progress,
            cameras_N=None if features.camera_ids is None else features.camera_ids[used],
            persons_N=None if features.person_ids is None else features.person_ids[used],
            overwrite=True,  # nothing reads them again
        )
    labels_N = np.full(len(features.image_ids), OUTLIER, np.int64)
    labels_N[used] = found.labels_N
    write_labels(config.output / LABELS_FILE, features.image_ids, labels_N)
    write_health(config.output / HEALTH_FILE, found, len(labels_N) - len(used))
    written = [LABELS_FILE, HEALTH_FILE]
    if rows is not None and write_cluster_picture(rows, labels_N, config.output / "clusters.png"):
        written.append("clusters.png")
    for note in found.notes:
        console.print(note)
    console.print(health_line(found))
    console.print(f"{', '.join(written)} are in {config.output}")
    return found


def computed_features(config: PseudoLabelsConfig, rows: Rows, loaded: Loaded, progress: PhaseLines) -> Features:
    """Features of ``rows``; what a stopped run of the same data and weights has written is not computed again."""
    files = FeatureFiles(str(config.output / "features" / _made_from(rows, loaded)), len(rows))
    features_ND, bad = extract(config, rows, loaded, config.batch_size, progress, files)
    if len(bad) > config.max_bad_share * len(rows):
        image_id, reason = bad[0]
        raise UserError(
            f"{len(bad)} of {len(rows)} images cannot be used, more than max_bad_share allows; the first: "
            f"{image_id}: {reason}"
        )
    usable_N = ~np.isin(rows.image_ids.astype(str), [image_id for image_id, _ in bad])
    return Features(rows.image_ids, features_ND, usable_N, dict(bad), rows.person_ids, rows.camera_ids)


def given_features(config: PseudoLabelsConfig, rows: Rows | None) -> Features:
    """Features of a file, with the identities and cameras of ``rows``; ``UserError`` when it is of other images."""
    assert config.features is not None
    found = read_features(config.features)
    if rows is None:
        return found
    order_N = np.argsort(rows.image_ids, kind="stable")  # a Parquet source has the order of its files
    if len(found.image_ids) != len(rows) or (found.image_ids != rows.image_ids[order_N]).any():
        unknown = np.setdiff1d(found.image_ids.astype(str), rows.image_ids.astype(str))
        absent = np.setdiff1d(rows.image_ids.astype(str), found.image_ids.astype(str))
        example = (unknown if len(unknown) else absent)[0]
        raise UserError(
            f"features: {config.features} is not of this data: {len(unknown)} of its {len(found.image_ids)} image ids "
            f"are not in the data, {len(absent)} of the data's {len(rows)} not in the file, such as {example!r}"
        )
    features_ND, usable_N = found.features_ND, found.usable_N
    if (order_N[1:] < order_N[:-1]).any():
        places_N = np.argsort(order_N)
        features_ND, usable_N = features_ND[places_N], usable_N[places_N]
    return Features(rows.image_ids, features_ND, usable_N, found.reasons, rows.person_ids, rows.camera_ids)


def write_labels(path: Path, image_ids: NDArray[np.object_], labels_N: NDArray[np.int64]) -> None:
    """``labels.parquet``: image_id and cluster, -1 for outliers; there whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    pq.write_table(pa.table({"image_id": pa.array(image_ids, pa.string()), "cluster": labels_N}), draft)
    draft.replace(path)


def write_health(path: Path, found: PseudoLabels, num_unusable: int) -> None:
    """``health.json``: what the screen says, for programs."""
    content = {
        **found.health.as_metrics(),
        "eps": found.eps,
        "neighbour_recall": found.recall,
        "unusable_images": num_unusable,
        "notes": found.notes,
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def health_line(found: PseudoLabels) -> str:
    """A clustering in a line."""
    health = found.health
    parts = [
        f"{health.num_clusters} clusters",
        f"{health.num_outliers} outliers ({health.outlier_share:.0%})",
        f"largest {health.largest_share:.0%}",
        f"eps {found.eps:.2f}",
    ]
    if found.recall is not None:
        parts.append(f"recall of neighbours {found.recall:.4f}")
    if health.nmi_to_last is not None:
        parts.append(f"NMI to last round {health.nmi_to_last:.3f}")
    if health.ari is not None:
        parts.append(f"ARI {health.ari:.3f}")
    return ", ".join(parts)


def _made_from(rows: Rows, loaded: Loaded) -> str:
    """Short digest of all that decides features: rows, weights, image size, pixel statistics."""
    digest = hashlib.sha256(rows.fingerprint().encode())
    digest.update(f"{loaded.image_input} {loaded.model.fusion} {loaded.model.extra_repr()}".encode())
    for name, value in loaded.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
