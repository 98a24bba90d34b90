"""Crops per second of the synthetic people on one core: drawn, drawn and JPEG-encoded, and JPEG-decoded."""

import argparse
import time
from collections.abc import Callable

from passreid_ray.data import SyntheticSource, decode_image, open_rows


def measure(name: str, call: Callable[[int], object], count: int) -> None:
    """Print the rate of ``call(0..count-1)`` by CPU time, which other programs do not disturb, and by the clock."""
    start_wall, start_cpu = time.perf_counter(), time.process_time()
    for index in range(count):
        call(index)
    cpu, wall = time.process_time() - start_cpu, time.perf_counter() - start_wall
    print(f"{name:<16}{count / cpu:9.0f} crops/cpu-s{count / wall:9.0f} crops/s{cpu:9.2f} cpu s for {count} crops")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    source = SyntheticSource(num_people=arguments.count // 12 + 1, height_px=arguments.height, width_px=arguments.width)
    rows = open_rows(source)
    rows.image(0)
    measure("draw", rows.image, arguments.count)
    measure("draw + encode", rows.image_bytes, arguments.count)
    encoded = [rows.image_bytes(index) for index in range(min(arguments.count, 300))]
    measure("decode", lambda index: decode_image(encoded[index % len(encoded)]), arguments.count)


if __name__ == "__main__":
    main()
