"""What only a GPU can show, in one command of at most nine minutes.

    python benchmarks/gpu.py [--minutes 9] [--only rates memory] [--out FOLDER]
    python benchmarks/gpu.py --quick --device cpu

Nothing has to be there but a CUDA GPU and what requirements.txt lists: no data, no network, no
weights. Clips are synthesised and networks have random weights; their sizes are those of a
competition. Each step (see STEPS and gpu_steps.py) is a process of its own with a time limit, so
that one that fails or hangs does not end the others; the most important ones come first. What the
minutes do not suffice for is listed as not run: name it with --only. FOLDER gets gpu.log, the
output of every step, and gpu.json, both after each step.

--quick is the same in tiny sizes, for a look at the steps themselves: its figures say nothing. On a
machine without a GPU, the steps that are about one say "needs CUDA".

At the end there is a table, with the last lines of the steps that failed. The last line is one JSON
object: `steps` has each step's `status`, `seconds` and `figures`. The exit code is 1 if a step
failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("gpu_steps.py")
LAST_LINES = 6  # of a failed step's output, in the table
MIN_FRACTION = 0.6  # of its limit: in less, a step is not begun
GRACE_SECONDS = 5  # from the request to stop a process to its end by force


@dataclass(frozen=True)
class Step:
    """A step: its time limit in seconds, and whether it needs a CUDA GPU."""

    name: str
    limit: int
    needs_cuda: bool = True


STEPS = (  # in order of importance
    Step("prepare", 120, needs_cuda=False),  # clips, stems and networks for the others
    Step("demo_bf16", 90),  # the demo; interrupted and resumed, with the difference
    Step("rates", 90, needs_cuda=False),  # front end, network and epoch
    Step("separation", 150, needs_cuda=False),  # against apply_model file by file
    Step("competition", 150, needs_cuda=False),  # clips to submit.csv, extrapolated to 1,000
    Step("memory", 120),  # micro-batches under a real limit of GPU memory
    Step("precision", 60),  # stems in half precision against float32
    Step("operations", 90, needs_cuda=False),  # what of a step is which; memory bandwidth reached
    Step("demo_fp16", 90),
    Step("demo_float32", 90, needs_cuda=False),
    Step("device_cache", 60),  # stems kept on the GPU, against read each epoch
    Step("two_processes", 125),  # torchrun on one GPU: refused with a message, or runs
    Step("compile", 200),  # torch.compile and each other measure, undone in turn
    Step("plain_training", 150, needs_cuda=False),  # an epoch by librosa, as many workers
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    parser.add_argument("--out", type=Path, help="folder for gpu.log and gpu.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--folder", folder, "--device", options.device]
        arguments += ["--quick"] if options.quick else []
        steps = [
            step for step in STEPS if not options.only or step.name in ("prepare", *options.only)
        ]
        out = options.out or Path(folder)

        def summary(results):
            return json.dumps({"steps": results, "quick": options.quick})

        results = run_steps(
            steps,
            lambda step: [sys.executable, SCRIPT, step.name, *arguments],
            seconds=60 * options.minutes,
            log=out / "gpu.log",
            save=lambda results: (out / "gpu.json").write_text(summary(results) + "\n"),
        )
    print(f"\n{table(results)}\n{summary(results)}")
    sys.exit(any(result["status"] in ("failed", "time limit") for result in results.values()))


def run_steps(steps, command, *, seconds, log, save):
    """{name: {status, seconds, figures or last_lines}} of `steps`, in `seconds` all together.

    command(step) is a step's command line. The first step's figures say whether there is a GPU
    ("cuda"); if it fails, the others are not run. Their output is appended to `log`, and after each
    step, save(the results so far) is called.
    """
    results, ends = {}, time.monotonic() + seconds
    cuda = True
    for number, step in enumerate(steps):
        left = ends - time.monotonic()
        if cuda is None or left < MIN_FRACTION * step.limit:
            results[step.name] = {"status": "not run"}
        elif step.needs_cuda and not cuda:
            results[step.name] = {"status": "needs CUDA"}
        else:
            print(f"{step.name} ...", flush=True)
            result = run_process(command(step), seconds=min(step.limit, left), log=log)
            results[step.name] = result
            print(f"{step.name}: {in_words(result)}", flush=True)
            if number == 0:
                cuda = result["figures"].get("cuda", False) if "figures" in result else None
        save(results)
    return results


def run_process(command, *, seconds, log):
    """{status, seconds, figures or last_lines} of a process that prints JSON at its end.

    After `seconds` it and its children are ended. Its output is appended to the file `log`.
    """
    started, limited = time.monotonic(), False
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            limited = True
        finally:
            end_group(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n=== {' '.join(map(str, command))}\n{text}")
    seconds = round(time.monotonic() - started, 1)
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    if process.returncode == 0 and (figures := last_object(lines)) is not None:
        return {"status": "ok", "seconds": seconds, "figures": figures}
    status = "time limit" if limited else "failed"
    return {"status": status, "seconds": seconds, "last_lines": lines[-LAST_LINES:]}


def last_object(lines):
    """The last JSON object among the last lines: libraries may complain after it, at the exit."""
    for line in reversed(lines[-LAST_LINES:]):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return None


def end_group(process):
    """Ends a process, if it still runs, and the children in its group; torchrun ends its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(results):
    """The results as lines of text: a step's name, its seconds, its figures or last lines."""
    lines = []
    for name, result in results.items():
        prefix = f"{name:<15} {result.get('seconds', ''):>6}  "
        wrapped = textwrap.wrap(
            in_words(result), 100, initial_indent=prefix, subsequent_indent=" " * 24
        )
        lines += wrapped + [f"{'':24}| {line[:200]}" for line in result.get("last_lines", ())]
    return "\n".join(lines)


def in_words(result):
    """A result's figures, or its status, in a line."""
    if "figures" not in result:
        return result["status"]
    return ", ".join(f"{name} {value}" for name, value in flat(result["figures"]))


def flat(figures, prefix=""):
    """[(name, value)] of figures in figures; `a.b` is the figure b of a."""
    pairs = []
    for name, value in figures.items():
        pairs += (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
        )
    return pairs


if __name__ == "__main__":
    main()
