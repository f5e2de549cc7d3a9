"""How many bits every way to agree sends, and what it costs: Table 1 of signSGD measured, for every codec.

* `sent`: bits per parameter by the formula of the codec, in the compiled program, and on the network card of each host.
* `links`: seconds on 2 and 4 hosts at 100 Mbit/s, where few bits are to pay.
* `devices`: seconds in one process, where nothing travels, so that all that counts is reading and writing.
* `selection`: the largest entries exactly or in blocks, and signs: seconds and error of a codec by itself.

`sent` and `links` need Linux, root and iproute2, which makes the links. Programs take turns, and what counts is the median of
the ratios of rounds.

    python -m experiments bits
    python -m experiments bits --parts devices,selection

Time and numbers to expect are in experiments/README.md.
"""

from experiments.speed.bits import devices
from experiments.speed.bits import links
from experiments.speed.bits import selection
from experiments.speed.bits import sent

PARTS = {"sent": sent, "links": links, "devices": devices, "selection": selection}
