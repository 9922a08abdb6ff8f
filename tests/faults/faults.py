"""The faults: what goes wrong, and what has to be there afterwards.

Each fault is a function that makes it happen once, checks what it left, and returns the outcome in a few words. It
raises `Lost` if anything was lost, corrupted, hung or ended in an error that says nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import children
import torch
from children import Ended
from small_models import tiny_opt

from optimum_opt_trn import NeuronOPTForCausalLM, OPTNeuronConfig, save_pretrained_split
from optimum_opt_trn.checkpoint.layout import INDEX_NAME
from optimum_opt_trn.checkpoint.verify import find_problems
from optimum_opt_trn.export import export_opt
from optimum_opt_trn.targets.cpu.kernels import VARIANT_VARIABLE, variants


PROMPT = torch.tensor([[2, 17, 99, 4, 56, 23, 8]])
CONFIG = OPTNeuronConfig(sequence_length=64, batch_size=2)


class Lost(AssertionError):
    """Something was lost, corrupted, hung, or failed without a word that helps."""


def demand(condition: object, what: object) -> None:
    if not condition:
        raise Lost(str(what))


class Ground:
    """A directory with a sound source, split checkpoint and export of two models, and what each has to give.

    Args:
        root: an empty directory.
        layers: of the models.
    """

    def __init__(self, root: Path, layers: int = 3):
        self.root, self.number = root, 0
        self.sources = [root / "source", root / "other source"]
        for seed, source in enumerate(self.sources):
            tiny_opt(seed=seed, num_hidden_layers=layers).save_pretrained(source)
        self.splits = [save_pretrained_split(source, root / f"split {i}") for i, source in enumerate(self.sources)]
        self.exports = [export_opt(source, root / f"export {i}", CONFIG) for i, source in enumerate(self.sources)]
        self.tokens = [generate(export) for export in self.exports]
        self.seconds: dict[str, float] = {}

    def place(self) -> Path:
        """An empty directory for one try."""
        self.number += 1
        place = self.root / f"try {self.number}"
        place.mkdir()
        return place

    def moment(self, name: str, work: Callable[[], object], random: Random) -> float:
        """A random moment of `work`, in seconds from its start; how long it takes is measured once, on a first run."""
        if name not in self.seconds:
            ended = children.run(work)
            demand(ended.how == "finished", f"{name}: {ended}")
            self.seconds[name] = ended.seconds
        return random.uniform(0, 1.05 * self.seconds[name])


def generate(export: Path, **options: object) -> list[list[int]]:
    model = NeuronOPTForCausalLM.from_pretrained(export, **options)
    tokens: list[list[int]] = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
    return tokens


def contents(directory: Path) -> dict[str, bytes]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def demand_sound(ground: Ground, export: Path, which: tuple[int, ...] = (0,)) -> int:
    """The export is whole, and is the one of these models; which one."""
    demand(not find_problems(export), find_problems(export))
    tokens = generate(export)
    demand(tokens in [ground.tokens[i] for i in which], "other tokens")
    return ground.tokens.index(tokens)


def said(ended: Ended) -> None:
    """Neither a raw error nor a hang."""
    demand(ended.how not in ("failed", "hung"), f"{ended.how}: {ended.text}")


# --- Ends at a random moment ---


def end_split(ground: Ground, random: Random, how: signal.Signals) -> str:
    """Over nothing, or over the split checkpoint of another model."""
    place, over = ground.place(), random.random() < 0.5
    output = place / "out"
    if over:
        shutil.copytree(ground.splits[1], output)

    def work() -> None:
        save_pretrained_split(ground.sources[0], output)

    name = f"split over {over}"
    moment = ground.moment(name, lambda: save_pretrained_split(ground.sources[0], place / "measured"), random)
    ended = children.run(work, until=moment, how=how)
    said(ended)
    if (output / INDEX_NAME).is_file():
        demand(not find_problems(output), find_problems(output))
        left = "whole"
    else:
        left = "marked as unfinished (no index)"
    save_pretrained_split(ground.sources[0], output)
    demand(not find_problems(output), find_problems(output))
    for name, content in contents(ground.splits[0]).items():
        demand(name == "split_manifest.json" or (output / name).read_bytes() == content, f"{name} differs")
    return f"{left}; whole after the next run"


def end_export(ground: Ground, random: Random, how: signal.Signals) -> str:
    """Over nothing, or over the export of another model."""
    place, over = ground.place(), random.random() < 0.5
    output = place / "out"
    if over:
        shutil.copytree(ground.exports[1], output)

    def work() -> None:
        export_opt(ground.sources[0], output, CONFIG)

    moment = ground.moment("export", lambda: export_opt(ground.sources[0], place / "measured", CONFIG), random)
    said(children.run(work, until=moment, how=how))
    if output.exists():
        left = "the new one is whole" if demand_sound(ground, output, (0, 1)) == 0 else "the earlier one is whole"
    else:
        demand(not over or (place / ".out.old").exists(), "the earlier export is gone")
        left = "the earlier one is whole next to it" if over else "nothing is there"
        if over:
            demand_sound(ground, place / ".out.old", (1,))
    export_opt(ground.sources[0], output, CONFIG)
    demand_sound(ground, output)
    demand({path.name for path in place.iterdir()} <= {"out", "measured"}, list(place.iterdir()))
    return f"{left}; whole after the next run"


def end_generate(ground: Ground, random: Random, how: signal.Signals) -> str:
    """Loading, then generating."""
    before = contents(ground.exports[0])
    moment = ground.moment("generate", lambda: generate(ground.exports[0]), random)
    ended = children.run(lambda: generate(ground.exports[0]), until=moment, how=how)
    said(ended)
    demand(contents(ground.exports[0]) == before, "the export changed")
    demand(generate(ground.exports[0]) == ground.tokens[0], "other tokens")
    return "the export is unchanged, the next call is right"


# --- Too little disk ---


@contextmanager
def small_disk(place: Path, kib: int) -> Iterator[Path]:
    disk = place / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        raise Skipped("mounting is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Skipped(Exception):
    """This host does not allow the fault to be made."""


def full_disk(ground: Ground, random: Random) -> str:
    """A file system that ends at a random place of an export, with an export of another model on it."""
    place = ground.place()
    size = sum(len(content) for content in contents(ground.exports[0]).values()) // 1024
    with small_disk(place, random.randint(size + 40, 2 * size + 60)) as disk:
        shutil.copytree(ground.exports[1], disk / "out")
        ended = children.run(lambda: export_opt(ground.sources[0], disk / "out", CONFIG))
        said(ended)
        if ended.how == "refused":
            demand("space" in ended.text or "free" in ended.text, ended.text)
            demand_sound(ground, disk / "out", (1,))
            return "refused, naming the space; the earlier export is whole"
        demand_sound(ground, disk / "out", (0,))
        return "it was enough"


def file_size_limit(ground: Ground, random: Random) -> str:
    """`ulimit -f`, below some of the files."""
    place = ground.place()
    limit = random.randint(100, 120_000)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = children.run(lambda: export_opt(ground.sources[0], place / "out", CONFIG), prepare=limited)
    said(ended)
    if ended.how == "refused":
        demand("File too large" in ended.text, ended.text)
        demand(not (place / "out").exists(), "a part was left")
        return "refused as too large; nothing was left"
    demand_sound(ground, place / "out")
    return "it was enough"


# --- Too little memory ---


def memory_limit(ground: Ground, random: Random) -> str:
    """An address space that ends somewhere while an export is made, loaded and used."""
    place = ground.place()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + random.randint(0, 64 << 20)

    def work() -> None:
        export_opt(ground.sources[0], place / "out", CONFIG)
        generate(place / "out")

    ended = children.run(work, prepare=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    # torch and Python raise different errors where memory ends, and some libraries abort.
    demand(ended.how != "hung", ended)
    memory = ("memory", "thread", "alloc", "mmap", "DoesNotFit")
    if ended.how == "failed":
        demand(any(word in ended.text.lower() for word in memory), ended.text)
    if (place / "out").exists():
        demand_sound(ground, place / "out")
    outcome = "it was enough" if ended.how == "finished" else "an error of memory; what is there is whole"
    return "ended by a library; what is there is whole" if ended.how == "killed" else outcome


# --- Directories ---


def read_only(ground: Ground, random: Random) -> str:
    """Another user makes an export, or changes one, where only the owner may write; and loads one from there."""
    if os.getuid() != 0:
        raise Skipped("only root may become another user")
    place = ground.place()
    shutil.copytree(ground.exports[0], place / "out")
    children.readable_by_all(place)
    children.readable_by_all(ground.sources[0])
    before = contents(place)
    target = random.choice(["out", "new", "deep/new"])
    ended = children.run(lambda: export_opt(ground.sources[0], place / target, CONFIG), prepare=children.become_nobody)
    demand(ended.how == "refused" and "ermission" in ended.text, ended)
    tokens: list[object] = []
    result = place.parent / f"{place.name}.tokens"
    result.touch()
    result.chmod(0o666)
    loaded = children.run(lambda: result.write_text(str(generate(place / "out"))), prepare=children.become_nobody)
    demand(loaded.how == "finished", loaded)
    tokens.append(result.read_text())
    demand(tokens == [str(ground.tokens[0])], tokens)
    demand(contents(place) == before, "the directory changed")
    return "writing is refused, loading works; nothing changed"


def vanished_export(ground: Ground, random: Random) -> str:
    """An export is removed while a model of it is in use, or before it is loaded."""
    place = ground.place()
    shutil.copytree(ground.exports[0], place / "out")
    model = NeuronOPTForCausalLM.from_pretrained(place / "out")
    files = [path for path in (place / "out").rglob("*") if path.is_file()]
    for path in random.sample(files, random.randint(1, len(files))):
        path.unlink()
    tokens = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
    demand(tokens == ground.tokens[0], "other tokens")
    ended = children.run(lambda: generate(place / "out"))
    said(ended)
    demand(ended.how == "finished" or str(place) in ended.text, ended)
    return f"the loaded model goes on; loading again is {ended.how}" + (", naming the file" * (ended.how == "refused"))


def vanished_output(ground: Ground, random: Random) -> str:
    """The directory that an export is written to is removed while it is written."""
    place = ground.place()
    moment = ground.moment("export", lambda: export_opt(ground.sources[0], place / "measured", CONFIG), random)

    def remove() -> None:
        time.sleep(moment)
        shutil.rmtree(place / ".out.partial", ignore_errors=True)

    def work() -> None:
        threading.Thread(target=remove, daemon=True).start()
        export_opt(ground.sources[0], place / "out", CONFIG)

    ended = children.run(work)
    said(ended)
    if (place / "out").exists():
        demand_sound(ground, place / "out")
        return "the export is whole"
    return "refused; nothing is there"


# --- The host ---


def no_proc(ground: Ground, random: Random) -> str:
    """No /proc: export, load and generate."""
    place = ground.place()

    def hide() -> None:
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
            os._exit(44)
        for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "none", "/proc"]):
            if subprocess.run(command, capture_output=True).returncode:
                os._exit(44)

    def work() -> None:
        assert not os.listdir("/proc")
        export_opt(ground.sources[0], place / "out", CONFIG)
        (place / "tokens").write_text(str(generate(place / "out")))

    if os.getuid() != 0:
        raise Skipped("only root may hide /proc")
    ended = children.run(work, prepare=hide)
    demand(ended.how == "finished", ended)
    demand((place / "tokens").read_text() == str(ground.tokens[0]), "other tokens")
    return "the same tokens"


def clock_jumps(ground: Ground, random: Random) -> str:
    """time.time jumps by hours, forth and back, between any two calls."""

    def jumping() -> None:
        original, jumps = time.time, Random(random.random())
        time.time = lambda: original() + jumps.choice([-7200, -1, 0, 1, 7200, 10**6])

    place = ground.place()

    def work() -> None:
        export_opt(ground.sources[0], place / "out", CONFIG)
        demand(generate(place / "out") == ground.tokens[0], "other tokens")

    ended = children.run(work, prepare=jumping)
    demand(ended.how == "finished", ended)
    demand_sound(ground, place / "out")
    return "the same tokens"


# --- Several at once ---


def several(ground: Ground, random: Random) -> str:
    """Two processes with four threads each generate with one export."""

    def work() -> None:
        model = NeuronOPTForCausalLM.from_pretrained(ground.exports[0])
        wrong: list[object] = []

        def call() -> None:
            for _ in range(3):
                tokens = model.generate(PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False).tolist()
                if tokens != ground.tokens[0]:
                    wrong.append(tokens)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        demand(not wrong, wrong)

    endings: list[Ended] = []
    runners = [threading.Thread(target=lambda: endings.append(children.run(work))) for _ in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    demand([ended.how for ended in endings] == ["finished"] * 2, endings)
    return "the same tokens in all threads"


def two_writers(ground: Ground, random: Random) -> str:
    """Two processes export two models to the same output."""
    place = ground.place()
    endings: list[Ended] = []

    def write(index: int) -> None:
        time.sleep(random.uniform(0, 0.02))
        endings.append(children.run(lambda: export_opt(ground.sources[index], place / "out", CONFIG)))

    runners = [threading.Thread(target=write, args=(index,)) for index in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    for ended in endings:
        said(ended)
        demand(ended.how == "finished" or "being written by another process" in ended.text, ended)
    demand(any(ended.how == "finished" for ended in endings), endings)
    demand_sound(ground, place / "out", (0, 1))
    refused = sum(ended.how == "refused" for ended in endings)
    return "one after the other" if not refused else "the second is refused; the first is whole"


def forked(ground: Ground, random: Random) -> str:
    """A process is forked while threads of it generate; the child generates."""
    model = NeuronOPTForCausalLM.from_pretrained(ground.exports[0])
    stop = threading.Event()

    def call() -> list[list[int]]:
        tokens: list[list[int]] = model.generate(
            PROMPT, max_new_tokens=12, min_new_tokens=12, do_sample=False
        ).tolist()
        return tokens

    def calls() -> None:
        while not stop.is_set():
            call()

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(random.uniform(0, 0.02))
    try:
        ended = children.run(lambda: demand(call() == ground.tokens[0], "other tokens"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    demand(ended.how == "finished", ended)
    return "the same tokens in the child"


# --- Artifacts of elsewhere ---


def other_instructions(ground: Ground, random: Random) -> str:
    """An export is loaded with the kernels of each instruction set that the processor has, and without kernels."""
    variant = random.choice([*variants(), "eager"])

    def work() -> None:
        eager = variant == "eager"
        if not eager:
            os.environ[VARIANT_VARIABLE] = variant
        demand(generate(ground.exports[0], eager=eager) == ground.tokens[0], "other tokens")

    ended = children.run(work)
    demand(ended.how == "finished", ended)
    return "the same tokens"


def later_version(ground: Ground, random: Random) -> str:
    """A file of an export was written in a format that is newer than this version."""
    place = ground.place()
    shutil.copytree(ground.exports[0], place / "out")
    name, key = random.choice(
        [
            ("neuron_config.json", '"format_version": '),
            ("compiled/manifest.json", '"format": '),
            ("export_manifest.json", '"format": '),
            ("checkpoint/split_manifest.json", '"format": '),
        ]
    )
    file = place / "out" / name
    before, _, after = file.read_text().partition(key)
    file.write_text(f"{before}{key}9{after}")
    ended = children.run(lambda: demand(generate(place / "out") == ground.tokens[0], "other tokens"))
    said(ended)
    demand(ended.how == "finished" or name.rpartition("/")[2] in ended.text or "format" in ended.text, ended)
    verified = find_problems(place / "out")
    demand(any(name.rpartition("/")[2] in problem for problem in verified), verified)
    return {"finished": "not needed to load: the same tokens", "refused": "refused, saying why"}[ended.how]


FAULTS: dict[str, Callable[[Ground, Random], str]] = {
    "SIGKILL at a random moment of a split": lambda g, r: end_split(g, r, signal.SIGKILL),
    "SIGKILL at a random moment of an export": lambda g, r: end_export(g, r, signal.SIGKILL),
    "SIGKILL at a random moment of loading and generating": lambda g, r: end_generate(g, r, signal.SIGKILL),
    "SIGINT (Ctrl-C) in a split": lambda g, r: end_split(g, r, signal.SIGINT),
    "SIGINT (Ctrl-C) in an export": lambda g, r: end_export(g, r, signal.SIGINT),
    "SIGINT (Ctrl-C) in loading and generating": lambda g, r: end_generate(g, r, signal.SIGINT),
    "SIGTERM in a split": lambda g, r: end_split(g, r, signal.SIGTERM),
    "SIGTERM in an export": lambda g, r: end_export(g, r, signal.SIGTERM),
    "The disk is full at a random place of an export": full_disk,
    "`ulimit -f` below files of an export": file_size_limit,
    "`ulimit -v` at a random size: export, load, generate": memory_limit,
    "Another user, without write access: export and load": read_only,
    "Files of an export vanish under a loaded model": vanished_export,
    "The output vanishes while it is written": vanished_output,
    "No /proc: export, load, generate": no_proc,
    "The clock jumps by hours: export, load, generate": clock_jumps,
    "Two processes with four threads each on one export": several,
    "Two processes export to the same output": two_writers,
    "A fork while threads generate": forked,
    "Kernels of another instruction set, or none": other_instructions,
    "A file in a format that is newer than this version": later_version,
}


def attempt(fault: Callable[[Ground, Random], str], ground: Ground, random: Random) -> str:
    """One try; what it wrote is removed."""
    try:
        return fault(ground, random)
    finally:
        for place in ground.root.glob("try *"):
            with suppress(OSError):
                shutil.rmtree(place) if place.is_dir() else place.unlink()
