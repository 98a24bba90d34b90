"""From packed shards to the eleven views: through Ray Data into a training worker, against a plain loop, on one core.

Both read, decode and make the same views of the same batches. Run from the repository:
``OMP_NUM_THREADS=1 python -m benchmarks.stream_views``
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

from benchmarks.part_views import official
from passreid_ray.data.parquet import ParquetSource, read_parquet
from passreid_ray.data.rows import GROUP_ROWS, Rows
from passreid_ray.data.stream import EncodedStream, read_encoded
from passreid_ray.data.streamed_order import OrderConfig
from passreid_ray.data.synthetic import SyntheticSource, synthetic_rows
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, data_share
from passreid_ray.train.view_loader import ViewBatch, ViewMaker
from passreid_ray.views import PartViews, ViewsConfig, normalize, view_rng

NUM_ROWS, BATCH_SIZE, STEPS, REPEATS = 4096, 64, 50, 3
REFERENCE_IMAGES = 320
SEED = 0


def main() -> None:
    """Print images per second and ratios."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # Ray's processes inherit it
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = read_parquet(ParquetSource(path=packed(Path(folder))))
        config = ViewsConfig(aspect="official")
        settings = OrderConfig(streams=16)
        order = settings.build(rows.group_starts, len(rows), batch_size=BATCH_SIZE, seed=SEED, num_workers=1)
        maker = ViewMaker(rows, order, config, SEED, torch.device("cpu"))
        connect(WorkersConfig())
        stream = EncodedStream(ray.put(rows), order, 0, 1)

        def plain() -> Iterable[object]:
            firsts = range(0, STEPS, order.window_end(0))
            runs = (range(first, min(order.window_end(first), STEPS)) for first in firsts)
            return (normalized(maker(table)) for run in runs for table in read_encoded(rows, order, run))

        def streamed() -> Iterable[object]:
            batches = maker.batches(stream.batches(0, STEPS, data_share(1)), threads=1)
            return (normalized(batch) for batch in batches)

        def normalized(batch: ViewBatch) -> object:
            return normalize(batch.global_BGCHW, config), normalize(batch.local_BPLCHW, config)

        part_views = PartViews(config)
        numbers = np.random.default_rng(SEED).permutation(len(rows))[:REFERENCE_IMAGES]
        reference = images_per_second(lambda: (one_by_one(rows, int(n), part_views) for n in numbers), 1)
        rates: dict[str, list[float]] = {"plain": [], "streamed": []}
        for _ in range(REPEATS + 1):  # the first round compiles and starts processes
            rates["plain"].append(images_per_second(plain, BATCH_SIZE))
            rates["streamed"].append(images_per_second(streamed, BATCH_SIZE))
        ray.shutdown()
    plain_rate, streamed_rate = (statistics.median(rates[name][1:]) for name in ("plain", "streamed"))
    print("one core, JPEG -> 2 views of 256x128 and 9 of 128x64, normalised")
    print(f"median of {REPEATS} runs of {STEPS} batches of {BATCH_SIZE}, taken in turns")
    print(f"Pillow and torchvision, image by image {reference:7.0f} images/s")
    print(f"in a plain loop                        {plain_rate:7.0f} images/s {plain_rate / reference:6.2f} times")
    print(f"through Ray Data into a worker {streamed_rate:15.0f} images/s {streamed_rate / reference:6.2f} times")
    print(f"Ray Data against the plain loop        {100 * streamed_rate / plain_rate:7.0f} %")


def images_per_second(batches: Callable[[], Iterable[object]], batch_size: int) -> float:
    """From the first batch on: starting an execution of Ray Data costs seconds, once for many epochs."""
    iterator = iter(batches())
    next(iterator)
    start = time.perf_counter()
    return sum(batch_size for _ in iterator) / (time.perf_counter() - start)


def one_by_one(rows: Rows, number: int, part_views: PartViews) -> list[torch.Tensor]:
    """What the published pipeline does with one image."""
    image_HWC = np.asarray(Image.open(BytesIO(rows.image_bytes(number))).convert("RGB"))
    return official(part_views, image_HWC, view_rng(SEED, 0, str(rows.image_ids[number])))


def packed(folder: Path) -> Path:
    """Synthetic crops, twice as large as drawn, in a Parquet file of ``folder``."""
    people = synthetic_rows(SyntheticSource(num_people=64, images_per_person=16))
    images = []
    for number in range(NUM_ROWS):
        drawn = Image.fromarray(people.image(number % len(people))).resize((96, 240), Image.Resampling.BICUBIC)
        file = BytesIO()
        drawn.save(file, "JPEG", quality=85 + number % 10)
        images.append(file.getvalue())
    table = pa.table({"image_id": [f"{number:06d}.jpg" for number in range(NUM_ROWS)], "image": images})
    pq.write_table(table, folder / "crops.parquet", row_group_size=GROUP_ROWS, compression="none")
    return folder


if __name__ == "__main__":
    main()
