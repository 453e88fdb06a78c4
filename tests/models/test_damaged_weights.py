"""Damaged, made-up and hostile weight files: our own errors only, by name, in bounded memory."""

from __future__ import annotations

import json
import math
import pickle
import random
import resource
import shutil
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import yaml

from lgpt.core.errors import CheckpointError
from lgpt.models.clip_encoder import ClipTextEncoder
from lgpt.models.ddconfig import config_from_json, config_from_yaml
from lgpt.models.flax_weights import read_flax_tensors
from lgpt.models.vqgan_import import load_vqvae
from lgpt.models.vqvae import VQVAE
from lgpt.models.vqvae_config import VQVAEConfig, shown

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEGABYTE = 1 << 20


def leaf(array: np.ndarray, *, shape: object = None, dtype: object = None) -> msgpack.ExtType:
    parts = (shape or list(array.shape), dtype or array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(parts, use_bin_type=True))


def flax_copy(folder: Path, change: Callable[[dict], object]) -> Path:
    """flax_tiny with its tree (leaves still packed) passed through `change`."""
    tree = msgpack.unpackb((FIXTURES / "flax_tiny" / "flax_model.msgpack").read_bytes(), raw=False)
    change(tree)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "flax_tiny" / "config.json", folder)
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree, use_bin_type=True))
    return folder


def taming_copy(folder: Path, change: Callable[[dict], object]) -> Path:
    """taming_f8_tiny's tensors passed through `change`."""
    content = torch.load(FIXTURES / "taming_f8_tiny" / "last.ckpt", weights_only=True)
    state = {k: v for k, v in content["state_dict"].items() if not k.startswith("loss.")}
    change(state)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "taming_f8_tiny" / "model.yaml", folder)
    torch.save({"state_dict": state}, folder / "last.ckpt")
    return folder


NAN = np.array([0.0] * 31 + [math.nan], dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["encoder"]["conv_in"].update(bias=leaf(np.zeros(31, np.float32))),
            r"encoder/conv_in/bias \(here encoder\.conv_in\.bias\) is \[31\], .* asks for \[32\]",
        ),
        (
            lambda t: t["quant_conv"].update(kernel=leaf(np.zeros((32, 32), np.float32))),
            r"quant_conv/kernel .* is \[32, 32\], .* asks for \[1, 1, 32, 32\]",
        ),
        (
            lambda t: t["encoder"]["norm_out"].update(scale=leaf(np.zeros((1, 32), np.float32))),
            r"encoder/norm_out/scale .* is \[1, 32\], .* asks for \[32\]",
        ),
        (lambda t: t["decoder"]["mid"].pop("attn_1"), r"missing decoder/mid/attn_1/k/bias"),
        (
            lambda t: t["encoder"].update(extra={"kernel": leaf(np.zeros(1, np.float32))}),
            r"unexpected encoder/extra/kernel",
        ),
        (
            lambda t: t["encoder"]["conv_in"].update(bias=leaf(NAN)),
            r"not finite, in: encoder/conv_in/bias\.",
        ),
        (
            lambda t: t["encoder"]["conv_in"].update(
                bias=leaf(np.full(32, 1e300, dtype=np.float64))
            ),
            r"not finite, in: encoder/conv_in/bias\.",
        ),
    ],
)
def test_flax_tensor_that_is_wrong_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_vqvae("pretrained_hf", flax_copy(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quant_conv.bias"), r"missing quant_conv\.bias\."),
        (lambda s: s.update({"decoder.extra": torch.zeros(1)}), r"unexpected decoder\.extra\."),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(17)}),
            r"quant_conv\.bias is \[17\], the config asks for \[16\]",
        ),
        (
            lambda s: s["quant_conv.bias"].fill_(math.inf),
            r"not finite, in: quant_conv\.bias\.",
        ),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(16, dtype=torch.int64)}),
            r"quant_conv\.bias holds no floating-point numbers",
        ),
        (
            lambda s: s.update({"decoder.huge": torch.zeros(1).expand(1 << 20, 1 << 20)}),
            r"tensors up to decoder\.huge \[1048576, 1048576\] claim more",
        ),
    ],
)
def test_taming_tensor_that_is_wrong_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_vqvae("pretrained_taming", taming_copy(tmp_path, change))


def test_half_precision_weights_are_read_in_float32(tmp_path: Path) -> None:
    def halve(state: dict) -> None:
        state.update({name: tensor.half() for name, tensor in state.items()})

    vqvae = load_vqvae("pretrained_taming", taming_copy(tmp_path, halve))
    assert {parameter.dtype for parameter in vqvae.parameters()} == {torch.float32}


def test_our_own_damaged_folder_is_refused(tmp_path: Path) -> None:
    config = VQVAEConfig(16, 4, z_channels=32, ch=32, ch_mult=(1, 1), num_res_blocks=1)
    vqvae = VQVAE(config)
    vqvae.save_pretrained(tmp_path)
    values = (tmp_path / "config.json").read_text()
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[1]", r"does not describe an lgpt VQ-VAE"),
        (values.replace('"ch": 32', '"ch": "x"'), r"ch is not allowed .* it reads 'x'"),
        (values.replace('"codebook_size": 16', '"codebook_size": 99999999999'), "at most 16777216"),
        (values.replace('"codebook_size": 16', '"codebook_size": 16777216'), "asks for"),
        (values.replace('"-1..1"', '"0..255"'), r"input_range is '0\.\.255', possible are"),
        (values.replace('"gradient"', '"magic"'), "codebook_update is not allowed"),
    ):
        assert text != values
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_vqvae("custom", tmp_path)
    (tmp_path / "config.json").write_text(values)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_vqvae("custom", tmp_path)
    with torch.no_grad():
        vqvae.decoder.conv_out.bias[1] = math.nan
    vqvae.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not finite, in: decoder\.conv_out\.bias"):
        load_vqvae("custom", tmp_path)


def damaged_listing() -> dict:
    return json.loads((FIXTURES / "evil" / "evil.json").read_text())["damaged"]


@pytest.mark.parametrize("number", range(3))
def test_flips_inside_the_pickle_are_refused(tmp_path: Path, number: int) -> None:
    recipe = damaged_listing()["recipes_flip_in_data.pkl_of_taming_tiny/last.ckpt"][number]
    shutil.copytree(FIXTURES / "taming_tiny", tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / "last.ckpt").read_bytes())
    content[recipe["offset"]] ^= recipe["xor"]
    (tmp_path / "last.ckpt").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"checksum of archive/data\.pkl is wrong"):
        load_vqvae("pretrained_taming", tmp_path)


def test_flips_and_cuts_anywhere_are_refused(tmp_path: Path) -> None:
    """What still opens (a flip in padding or a date) does not fit, so the error is always ours."""
    random_ = random.Random(0)
    shutil.copy(FIXTURES / "taming_f8_tiny" / "model.yaml", tmp_path)
    torch.save({"state_dict": {"encoder.a": torch.arange(8.0)}}, tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        content[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        cut = random_.choice([len(whole)] * 3 + [random_.randrange(len(whole))])
        (tmp_path / "last.ckpt").write_bytes(bytes(content[:cut]))
        with pytest.raises(CheckpointError):  # it never fits the yaml
            load_vqvae("pretrained_taming", tmp_path)


@pytest.mark.parametrize(
    ("source", "fixture", "weights"),
    [
        ("pretrained_taming", "taming_tiny", "last.ckpt"),
        ("pretrained_llamagen", "llamagen_vq_tiny", "vq_ds16_tiny.pt"),
        ("pretrained_hf", "flax_tiny", "flax_model.msgpack"),
        ("custom", "", "model.safetensors"),
        ("clip", "clip_tiny", "model.safetensors"),
    ],
)
def test_pointer_that_git_leaves_in_place_of_weights_is_named(
    tmp_path: Path, source: str, fixture: str, weights: str
) -> None:
    if fixture:
        shutil.copytree(FIXTURES / fixture, tmp_path, dirs_exist_ok=True)
    else:
        load_vqvae("pretrained_taming", FIXTURES / "taming_tiny").save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 304295436\n"
    (tmp_path / weights).write_text(pointer)
    read = {"clip": ClipTextEncoder.from_pretrained}.get(source, partial(load_vqvae, source))
    with pytest.raises(CheckpointError, match=f"{weights} is a pointer of Git LFS.*git lfs pull"):
        read(tmp_path)


def test_file_of_another_kind_is_not_called_hostile(tmp_path: Path) -> None:
    for name in ("images.npy", "model.yaml"):
        path = FIXTURES / "taming_tiny" / name
        with pytest.raises(CheckpointError, match=rf"{name} is not a PyTorch file: it begins with"):
            load_vqvae("pretrained_taming", path)


def test_zip_that_claims_more_than_it_has_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 * MEGABYTE))
    with peak_below(16 * MEGABYTE), pytest.raises(CheckpointError, match="its parts claim 67,108,"):
        load_vqvae("pretrained_taming", path, ddconfig=FIXTURES / "taming_tiny" / "model.yaml")


def test_old_format_file_is_read_too_and_its_damage_refused(tmp_path: Path) -> None:
    usual = load_vqvae("pretrained_taming", FIXTURES / "taming_f8_tiny")
    shutil.copy(FIXTURES / "taming_f8_tiny" / "model.yaml", tmp_path)
    content = torch.load(FIXTURES / "taming_f8_tiny" / "last.ckpt", weights_only=True)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": content["state_dict"]}, path, _use_new_zipfile_serialization=False)
    assert load_vqvae("pretrained_taming", tmp_path).weights_digest() == usual.weights_digest()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="can be read as data"):
        load_vqvae("pretrained_taming", tmp_path)
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        load_vqvae("pretrained_taming", tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a \.ckpt file nor a folder"):
        load_vqvae("pretrained_taming", tmp_path / "nothing.ckpt")


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    """Fails when Python and msgpack lay out more than so many bytes at once."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak:,} bytes at once"


@contextmanager
def resident_growth_below(limit: int) -> Iterator[None]:
    """As `peak_below`, for many calls: tracing would make them slow."""
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < limit, f"{grown:,} bytes more"


HUGE = (1 << 32) - 1
BIG_LIST = b"\xdd" + HUGE.to_bytes(4, "big")
LENGTHS = {
    "list": BIG_LIST,
    "map": b"\xdf" + HUGE.to_bytes(4, "big"),
    "string": b"\xdb" + HUGE.to_bytes(4, "big"),
    "bytes": b"\xc6" + HUGE.to_bytes(4, "big"),
    "extension": b"\xc9" + HUGE.to_bytes(4, "big") + b"\x01",
    "lists in lists": (b"\xdd" + (1 << 20).to_bytes(4, "big")) * 1000 + b"\0" * MEGABYTE,
    "maps in maps": b"\x81\xa1a" * 5000,
    "list in a leaf": msgpack.packb({"a": msgpack.ExtType(1, BIG_LIST)}),
    "terabytes": msgpack.packb({"a": leaf(np.zeros(4), shape=[1 << 20, 1 << 20])}),
    "the rest": msgpack.packb({"a": leaf(np.zeros(4), shape=[-1])}),
    "negative": msgpack.packb({"a": leaf(np.zeros(4), shape=[-2, -2])}),
    "no shape": msgpack.packb({"a": leaf(np.zeros(4), shape=7)}),
    "objects": msgpack.packb({"a": leaf(np.zeros(4), dtype="object")}),
    "dtype number": msgpack.packb({"a": leaf(np.zeros(4), dtype=5)}),
    "other extension": msgpack.packb({"a": msgpack.ExtType(2, b"x")}),
    "date": msgpack.packb({"a": msgpack.Timestamp(1)}),
    "twice": b"\x82\xa1a\x80\xa1a\x80",
    "slash": msgpack.packb({"a/b": leaf(np.zeros(4))}),
    "number as name": msgpack.packb({1: leaf(np.zeros(4))}),
    "chunks that are maps": msgpack.packb(
        {"__msgpack_chunked_array__": True, "chunks": {"0": {}}, "shape": {"0": 1}}
    ),
    "chunks missing": msgpack.packb({"__msgpack_chunked_array__": True, "chunks": {}}),
    "a list": msgpack.packb([1, 2]),
    "a number": b"\x07",
    "nothing": b"",
}


@pytest.mark.parametrize("name", LENGTHS)
def test_msgpack_that_promises_much_lays_out_little(tmp_path: Path, name: str) -> None:
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(LENGTHS[name])
    with peak_below(16 * MEGABYTE), pytest.raises(CheckpointError, match="damaged or not a Flax"):
        read_flax_tensors(path)


def mutated(content: bytes, random_: random.Random) -> bytes:
    """Flips, overwritten runs, cuts, repeats and made-up bytes, one to four of them."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        place = random_.randrange(len(data) + 1)
        kind = random_.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[place : place + random_.randint(1, 8)] = random_.choice(
                [b"\xff" * 4, b"\xdd\xff\xff\xff\xff", b"\x81", b"&a *a", b"!!", b"[{", b"9" * 20]
            )
        elif kind == 2:
            del data[place : place + random_.randint(1, 16)]
        elif kind == 3:
            data[place:place] = data[place : place + random_.randint(1, 64)]
        else:
            data[place:place] = bytes(random_.randrange(256) for _ in range(random_.randint(1, 4)))
    return bytes(data)


def test_mutated_msgpack_gives_tensors_or_our_own_error(tmp_path: Path) -> None:
    random_ = random.Random(0)
    whole = msgpack.packb(
        {
            "encoder": {
                "conv_in": {"bias": leaf(np.ones(2, np.float32))},
                "norm": {"scale": leaf(np.ones((1, 1, 1, 2), np.float16))},
            },
            "quantize": {
                "__msgpack_chunked_array__": True,
                "shape": {"0": 2, "1": 2},
                "chunks": {"0": leaf(np.ones(3, np.float32)), "1": leaf(np.ones(1, np.float32))},
            },
        }
    )
    path, refused = tmp_path / "flax_model.msgpack", 0
    with resident_growth_below(64 * MEGABYTE):
        for _ in range(2000):
            path.write_bytes(mutated(whole, random_))
            try:
                read_flax_tensors(path)
            except CheckpointError as error:
                assert len(str(error)) < 1000  # noqa: PT017
                refused += 1
    assert refused > 1000


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_mutated_config_gives_a_config_or_our_own_error(tmp_path: Path, kind: str) -> None:
    random_ = random.Random(0)
    source = {"yaml": "taming_f8_tiny/model.yaml", "json": "flax_tiny/config.json"}[kind]
    read = {"yaml": config_from_yaml, "json": config_from_json}[kind]
    whole = (FIXTURES / source).read_bytes()
    if kind == "yaml":  # what lgpt reads of it
        params = yaml.safe_load(whole)["model"]["params"]
        del params["lossconfig"]
        whole = yaml.safe_dump({"model": {"params": params}}).encode()
    path, refused = tmp_path / f"model.{kind}", 0
    with resident_growth_below(64 * MEGABYTE):
        for number in range(1000):
            path.write_bytes(mutated(whole, random_))
            try:
                config = read(path, "-1..1")
                if number % 20 == 0:  # what passes can be built
                    with torch.device("meta"):
                        VQVAE(config)
            except CheckpointError as error:
                assert len(str(error)) < 1000  # noqa: PT017
                refused += 1
    assert refused > 300


LAUGHS = "a0: &a0 [1, 2]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)
MODEL = (FIXTURES / "taming_f8_tiny" / "model.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            LAUGHS + MODEL.replace("double_z: false", "double_z: *a11"),
            r"double_z is \[a list, .*, only False",
        ),
        (LAUGHS + MODEL.replace("embed_dim: 16", "embed_dim: *a11"), "it reads"),
        (MERGES + MODEL, "merge keys"),
        ("[" * 20_000, "opens more than 500 brackets"),
        ("- " * 10_000, "cannot be read"),
        ("x: " + "9" * 30_000 + "\n" + MODEL, None),
        (MODEL.replace("n_embed: 48", "n_embed: 0x" + "f" * 20_000), "a number of 80000 bits"),
        (MODEL.replace("n_embed: 48", "n_embed: 99999999"), "codebook_size is 99999999, at most"),
        (MODEL.replace("- 1\n", "- 1000000\n", 1), "up to 12 numbers from 1 to 64"),
        (MODEL.replace("ch: 32", "ch: 33"), "ch is not allowed"),
        (MODEL.replace("resolution: 256", "resolution: !!timestamp x"), "cannot be read"),
        (MODEL.replace("resolution: 256", "resolution: !!python/name:os.system ''"), "python/name"),
        (MODEL + "# " + "x" * 100_000, "has 100,"),
        ("model: {params: {ddconfig: 7, n_embed: 1, embed_dim: 1}}", "ddconfig holds no fields"),
        ("- 1", "needs ddconfig"),
    ],
)
def test_yaml_that_is_an_attack_is_refused_at_once(
    tmp_path: Path, text: str, message: object
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with peak_below(32 * MEGABYTE):
        if message is None:  # Python 3.9 reads numbers of any length
            try:
                config_from_yaml(path, "-1..1")
            except CheckpointError as error:
                assert "cannot be read" in str(error)  # noqa: PT017
            return
        with pytest.raises(CheckpointError, match=str(message)) as raised:
            config_from_yaml(path, "-1..1")
    assert len(str(raised.value)) < 1000


def test_flax_config_that_is_no_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, message in (
        ("[]", "holds no fields"),
        ("[" * 400 + "1", "cannot be read"),
        ("{" * 501, "brackets"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            config_from_json(path, "-1..1")


def test_values_are_shown_short() -> None:
    assert [shown(v) for v in (None, True, 1.5, 3, "a", [1, "b"])] == [
        "None",
        "True",
        "1.5",
        "3",
        "'a'",
        "[1, 'b']",
    ]
    assert shown(1 << 80) == "a number of 81 bits"
    assert shown({}) == "a dict"
    assert len(shown("x" * 1000)) < 50
    assert shown([0] * 100) == "a list"
