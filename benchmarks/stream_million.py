"""A million crops: packed, then streamed through an epoch as encoded images; rates, first batch, memory over time.

The crops are drawn people, each written many times over with another JPEG quality and another border, so that no two
have the same bytes. Run from the repository: ``python -m benchmarks.stream_million [folder] [rows]``; what is in the
folder is used again, and needs about 4 KB a row twice.
"""

import io
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from PIL import Image

from passreid_ray.data.execution import Watch
from passreid_ray.data.order import EpochwiseOrder
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.data.rows import Rows
from passreid_ray.data.sources import open_rows
from passreid_ray.data.stream import EncodedStream
from passreid_ray.data.streamed_order import OrderConfig
from passreid_ray.data.synthetic import SyntheticSource
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, data_share
from passreid_ray.train.view_loader import ViewMaker
from passreid_ray.views import ViewsConfig

DRAWN = 20_000
PER_ARCHIVE = 50_000
BATCH_SIZE = 64
VIEWED_ROWS = 50_000
SAMPLE_SECONDS = 2.0


def main() -> None:
    """Make the crops, pack them, stream them; print figures."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("outputs/stream_million")
    num_rows = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    make_archives(folder / "tar", num_rows)
    data = ["data.kind=tar", f"data.path={folder / 'tar'}", f"output={folder / 'packed'}"]
    subprocess.run([sys.executable, "jobs/pack.py", *data], check=True)
    connect(WorkersConfig())
    start = time.perf_counter()
    rows = open_rows(ParquetSource(path=folder / "packed"))
    print(f"{len(rows):,} rows opened in {time.perf_counter() - start:.1f} s")
    order = OrderConfig().build(rows.group_starts, len(rows), batch_size=BATCH_SIZE, seed=0, num_workers=1)
    rows_ref = ray.put(rows)
    ready = time.perf_counter() - start
    stream = EncodedStream(rows_ref, order, 0, 1)
    with MemoryWatch() as memory:
        begin = time.perf_counter()
        seen, num_bytes, first = np.zeros(len(rows), np.int32), 0, 0.0
        for step, table in enumerate(stream.batches(0, int(order.steps_per_epoch), data_share(1))):
            if step == 0:
                first = time.perf_counter() - begin
            np.add.at(seen, table["row"].to_numpy(), 1)
            num_bytes += table["image"].nbytes
        seconds = time.perf_counter() - begin
    print(
        f"first batch {ready + first:.1f} s after opening the data began, {first:.1f} s after the stream began\n"
        f"epoch: {seen.sum():,} rows once, {(seen == 0).sum()} left out, none twice: {seen.max() == 1}; "
        f"{seen.sum() / seconds:,.0f} rows/s, {num_bytes / seconds / 1e6:.0f} MB/s"
    )
    memory.report()
    viewed(rows, order, rows_ref)
    ray.shutdown()


def viewed(rows: Rows, order: EpochwiseOrder, rows_ref: Any) -> None:
    """Streamed, decoded and made into views by one thread of this process."""
    torch.set_num_threads(1)
    maker = ViewMaker(rows, order, ViewsConfig(), 0, torch.device("cpu"))
    stream = EncodedStream(rows_ref, order, 0, 1)
    steps = VIEWED_ROWS // BATCH_SIZE
    list(maker.batches(stream.batches(0, 2, data_share(1)), 1))  # compiles
    begin = time.perf_counter()
    num = sum(len(batch.global_BGCHW) for batch in maker.batches(stream.batches(0, steps, data_share(1)), 1))
    seconds = time.perf_counter() - begin
    print(f"{num:,} rows streamed, decoded and made into 11 views by one thread: {num / seconds:,.0f} images/s")


class MemoryWatch:
    """Samples the memory of this process and all below it (Ray's among them) while it lasts."""

    def __enter__(self) -> "MemoryWatch":
        self._done = threading.Event()
        self._samples: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def report(self) -> None:
        """Print some samples and the highest ones."""
        print("seconds   PSS of all processes   object store used by the stream")
        shown = np.linspace(0, len(self._samples) - 1, num=min(10, len(self._samples)), dtype=int)
        for seconds, pss, store in (self._samples[index] for index in shown):
            print(f"{seconds:7.1f} {pss / 2**30:15.2f} GiB {store / 2**20:20.0f} MiB")
        highest = max(pss for _, pss, _ in self._samples)
        print(f"highest: {highest / 2**30:.2f} GiB, which holds the pages of the object store that are in use")

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(SAMPLE_SECONDS):
            pss = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    pss += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._samples.append((time.perf_counter() - self._start, pss, Watch.peak_bytes))
            Watch.peak_bytes = 0


def make_archives(folder: Path, num_rows: int) -> None:
    """Tar archives of ``num_rows`` JPEGs in ``folder``, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    firsts = [first for first in range(0, num_rows, PER_ARCHIVE) if not (folder / f"{first:08d}.tar").exists()]
    start = time.perf_counter()
    with ProcessPoolExecutor() as pool:
        list(pool.map(make_archive, [folder] * len(firsts), firsts, [num_rows] * len(firsts)))
    if firsts:
        print(f"{num_rows:,} crops made in {time.perf_counter() - start:.0f} s")


def make_archive(folder: Path, first: int, num_rows: int) -> None:
    """One archive; another process may make the next one at the same time."""
    people = open_rows(SyntheticSource(num_people=DRAWN // 16, images_per_person=16))
    draft = folder / f".{first:08d}.part"
    copies = -(-num_rows // DRAWN)
    with tarfile.open(draft, "w") as archive:
        # Copies of one crop follow each other, so that each crop is drawn once.
        numbers = range(first, min(first + PER_ARCHIVE, num_rows))
        drawn, image = -1, Image.new("RGB", (1, 1))
        for number in numbers:
            if number // copies != drawn:
                drawn = number // copies
                image = Image.fromarray(people.image(drawn % len(people)))
            copy = number % copies
            shifted = image.crop((0, 0, image.width, image.height - copy // 16))
            file = io.BytesIO()
            shifted.save(file, "JPEG", quality=80 + copy % 16)
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
    draft.rename(folder / f"{first:08d}.tar")


if __name__ == "__main__":
    main()
