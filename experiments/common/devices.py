"""Host devices: a CPU that stands in for several."""

import os

import jax


def prepare(count: int) -> None:
    """Ask for `count` host devices, before JAX looks for devices for the first time.

    jax 0.10 can deadlock in a plain training loop when there are fewer threads than twice the devices, so ask for
    those too. What the environment already says about either stays.

    Args:
      count: Devices, one for each worker.
    """
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={count}".strip()
    os.environ.setdefault("NPROC", str(max(16, 2 * count)))


def take(count: int) -> list:
    """`count` devices: accelerators where there are enough, else host devices; with many processes equally many of each.

    Raises:
      ValueError: If there are fewer.
    """
    if jax.process_count() > 1:
        each = count // jax.process_count()
        return [device for i in range(jax.process_count()) for device in jax.local_devices(process_index=i)[:each]]
    for found in (jax.devices(), jax.devices("cpu")):
        if len(found) >= count:
            return found[:count]
    raise ValueError(
        f"`--workers {count}` needs as many devices, found {len(found)}: take `--runner simulate`, fewer workers, or "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={count} in the environment."
    )
