from __future__ import annotations

import gc
import os

import pytest

from vlmpack.errors import SampleError
from vlmpack.images import decode, spool
from vlmpack.images.spool import MIN_BYTES, Spool, SpooledBytes


def image(number, extra=0):
    return bytes([number]) * (MIN_BYTES + extra)


def num_open():
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files")


def test_what_is_put_comes_back():
    disk = Spool()
    data = [image(number, extra=number) for number in range(20)]
    places = [disk.put(entry) for entry in data]
    assert all(isinstance(place, SpooledBytes) for place in places)
    assert [len(place) for place in places] == [len(entry) for entry in data]
    for place, entry in reversed(list(zip(places, data, strict=True))):
        assert place.read_bytes() == entry


def test_small_images_stay_in_memory():
    data = bytes(MIN_BYTES - 1)
    assert Spool().put(data) is data


@needs_proc
def test_a_segment_is_closed_when_its_last_image_is_gone(monkeypatch):
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 2 * MIN_BYTES)
    gc.collect()
    before = num_open()
    disk = Spool()
    places = [disk.put(image(number)) for number in range(6)]  # two a segment
    assert num_open() == before + 3
    del places[:3]
    assert num_open() == before + 2, "one image of the second segment still waits"
    del places[0]
    assert num_open() == before + 1
    del places, disk
    assert num_open() == before


@needs_proc
def test_no_file_has_a_name(tmp_path):
    place = Spool(tmp_path).put(image(1))
    assert isinstance(place, SpooledBytes)
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_images_stay_in_memory_with_one_warning(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    disk = Spool()
    first = disk.put(image(1))
    monkeypatch.setattr(os, "pwrite", full)
    data = [image(2), image(3)]
    assert [disk.put(entry) for entry in data] == data
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert disk.put(image(4)).read_bytes() == image(4), "the disk has room again"
    assert first.read_bytes() == image(1)


def test_another_process_gets_the_bytes():
    made, arguments = Spool().put(image(7)).__reduce__()
    assert made(*arguments) == image(7)


def test_a_disk_that_fails_refuses_the_sample():
    disk = Spool()
    place = disk.put(image(7))
    os.ftruncate(disk._segment.file, 5)
    with pytest.raises(SampleError, match="cannot be read from the spool: 5 of") as error:
        decode(place)
    assert error.value.reason == "image_unreadable"
