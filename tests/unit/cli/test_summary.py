from __future__ import annotations

import pytest

from vlmpack.cli.summary import _decoders


@pytest.mark.parametrize(
    ("decoders", "words"),
    [
        ({"simplejpeg": "1.9.0", "numba": "0.68.1"}, "simplejpeg 1.9.0, numba 0.68.1; Pillow for the rest"),
        (
            {"simplejpeg": None, "numba": "0.68.1"},
            "numba 0.68.1; Pillow for the rest and in place of simplejpeg",
        ),
        ({"numba": None}, "none; Pillow for the rest and in place of numba"),
    ],
)
def test_decoders_in_words(decoders, words):
    assert _decoders(decoders) == words
