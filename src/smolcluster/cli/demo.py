"""`smolcluster demo`: train a small GPT over three processes of this machine, then let it write."""

from __future__ import annotations

from typing import Annotated

import typer

from smolcluster.cli.train import Choices, Out, Overrides, Quiet, conclude, plan, reporter, result_lines, say_to_stderr

PRESET = "demo"
RANKS = 3
PROMPT = "The "
TOKENS = 500


def demo(
    out: Out = None,
    override: Overrides = None,
    prompt: Annotated[str, typer.Option(help="What the generated text begins with.")] = PROMPT,
    tokens: Annotated[int, typer.Option(help="Bytes of text to generate.", min=1)] = TOKENS,
    quiet: Quiet = False,
) -> None:
    """Train a small GPT over 3 processes of this machine, on text that ships with Python, and let it write.

    No network, no account, no question asked.
    """
    chosen = Choices(PRESET, None, None, override, None, None, None, quiet)
    config, _, folder = plan(chosen, None, out, leads=True)
    from smolcluster.run.local import run_local

    say = say_to_stderr(quiet)
    say(
        f"demo: {RANKS} processes train a {config.model.type} of {config.model.num_layers} layers on Python's own "
        f"documentation, over authenticated TCP on this machine, {config.training.max_steps} steps"
    )
    ran = run_local(config, RANKS, folder, reporter(config, quiet))
    if ran.exit_code != 0 or ran.summary is None or ran.out is None:
        conclude(ran, config, quiet)
    say(f"training is done; now the trained model writes, its layers spread over {RANKS} processes")

    from smolcluster.run.generate import generate_text

    written = generate_text(ran.out / "checkpoints", prompt, tokens, stages=RANKS, logs=ran.out / "logs")
    for line in result_lines(ran.summary, config):
        print(line)
    print(f"\n--- {tokens} bytes, written by the model after {prompt!r}\n{written.text}\n---")
    if written.words:
        print(
            f"{written.known_words} of its {written.words} words of 3 or more letters "
            f"({written.known_words / written.words:.0%}) occur in the training text"
        )
    print("\nwhat is where:")
    for name, meaning in (
        ("loss.png", "training and validation loss"),
        ("metrics.jsonl", "one line per rank and step"),
        ("summary.json", "the result, with the SHA-256 of the weights on each rank"),
        ("checkpoints/latest", "names the checkpoint with the trained weights"),
        ("config.yaml", "everything that was set"),
        ("logs/", "what each process logged"),
    ):
        if (ran.out / name).exists():
            print(f"  {ran.out / name}  {meaning}")
    print("try next: smolcluster train --preset classicdp_gpt --local 2, smolcluster config list")
    raise typer.Exit(0)
