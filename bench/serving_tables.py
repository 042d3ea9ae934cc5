"""Tables of what serves: speed, equality, endurance. `bench.tables` writes them."""

from typing import Any

from bench.sheet import markdown, read, versions, with_spread


def runtime() -> str:
    """Tokens a second of the runtime and transformers."""
    rows = read("cpu/runtime.jsonl")
    first = rows[0]
    where = f"{first['threads']} CPU threads"
    return f"{speeds(rows)}{shape(first)}, {where}, {versions(first)}.\n"


def runtime_bits() -> str:
    """Tokens a second of models in fewer bits, one request at a time: a row a model."""
    rows = read("cpu/runtime_bits.jsonl")
    pair, body = "runtime, compressed / runtime", []
    for row in rows:
        rates, ratio = row["tokens_per_second"], row["ratios"][pair]
        made_of = "; ".join(f"{count} {what}" for what, count in row["made_of"].items())
        speeds = [f"{rates[name][1]:.1f}" for name in ("transformers", "runtime", "runtime, compressed")]
        body.append([made_of, f"{row['bits']:.2f}", *speeds, with_spread(ratio)])
    heads = [
        "layers",
        "bits a weight",
        "transformers, bf16",
        "runtime, bf16",
        "runtime, these layers",
        "ratio of the two",
    ]
    first = rows[0]
    return f"{markdown(heads, body)}{shape(first)}, {first['threads']} CPU threads, {versions(first)}.\n"


def vllm() -> str:
    """Tokens a second of vLLM and the runtime."""
    rows = read("cpu/vllm.jsonl")
    first = rows[0]
    where = f"cut from `{first['text']}`, {first['device']}"
    return f"{speeds(rows)}{shape(first)}, {where}, {versions(first)}.\n"


def speeds(rows: list[dict[str, Any]]) -> str:
    """A row a batch size: tokens a second, and ratios."""
    first = rows[0]
    names, pairs = list(first["tokens_per_second"]), list(first["ratios"])
    body = []
    for row in rows:
        rates = [f"{row['tokens_per_second'][name][1]:.1f}" for name in names]
        ratios = [with_spread(row["ratios"][pair]) for pair in pairs]
        body.append([str(row["batch"]), *rates, *ratios])
    return markdown(["requests at once", *names, *pairs], body)


def shape(first: dict[str, Any]) -> str:
    """What was timed, as the beginning of a sentence."""
    part = first["kept"]
    kept = f"; compressed: {part:.0%} of the linear layers' parameters kept" if part and part < 1 else ""
    return (
        f"\nTokens a second, and ratios within a round: median, and p20 to p80 of {first['rounds']} rounds in "
        f"which all take turns. `{first['model']}` in {first['dtype']}{kept}. Prompts of {first['prompt']} tokens, "
        f"{first['new']} new ones"
    )


def backends() -> str:
    """Accuracy of one folder in memory and through lm-eval's backends: a row a task and measure."""
    rows = read("cpu/backends.jsonl")
    first, ways = rows[0], list(dict.fromkeys(row["way"] for row in rows))
    body = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        scores = [row["scores"] for row in rows if row["dtype"] == dtype]
        for task, measures in scores[0].items():
            for key in (key for key in ("acc", "acc_norm") if key in measures):
                figures = [f"{score[task][key]:.1%} ± {score[task][f'{key}_stderr']:.1%}" for score in scores]
                body.append([f"`{task}`", f"`{key}`", dtype, *figures])
    table = markdown(["task", "measure", "dtype", *ways], body)
    asked = "All" if first["limit"] is None else f"The first {first['limit']}"
    return (
        f"{table}\nAccuracy and its standard error of one folder: `{first['model']}` with {first['kept']:.0%} of the "
        f"linear layers' parameters kept. {asked} questions of each task. {versions(rows[-1])}.\n"
    )


def equality() -> str:
    """Greedy outputs that are those of transformers: a row a model and batch size."""
    rows = read("cpu/equality.jsonl")
    heads = ["model", "requests at once", "equal", "prompts in chunks", "tokens shared", "preempted", "cancelled"]
    body = [
        [f"`{row['model']}`" if ":" in row["model"] else row["model"], str(row["batch"])]
        + [f"{row['equal']} of {row['prompts']}"]
        + [str(row[key]) for key in ("chunked", "cached_tokens", "preempted", "cancelled")]
        for row in rows
    ]
    first = rows[0]
    return f"{markdown(heads, body)}\n{first['new']} tokens an output, fp32, a CPU. {versions(first)}.\n"


def speculative() -> str:
    """What a draft does: acceptance, and speed against the model alone."""
    rows = read("cpu/speculative.jsonl")
    heads = ["draft", "equal", "drafted tokens that stay", "tokens a check", "tokens/s", "alone", "ratio"]
    body = []
    for row in rows:
        rates, ratio = row["tokens_per_second"], row["ratio"]
        line = [f"{row['kept']:.0%} kept", f"{row['equal']} of {row['prompts']}", f"{row['acceptance']:.0%}"]
        speed = [f"{row['tokens_per_check']:.2f}", f"{rates['drafting'][1]:.1f}", f"{rates['alone'][1]:.1f}"]
        body.append([*line, *speed, with_spread(ratio)])
    first = rows[0]
    return (
        f"{markdown(heads, body)}\n`{first['model']}` in {first['dtype']}, greedy, prompts of {first['prompt']} tokens "
        f"and {first['new']} new ones, {first['draft_tokens']} drafted at a time, {first['threads']} CPU thread; "
        f"median, and p20 to p80. {versions(first)}.\n"
    )


def memory() -> str:
    """What a load adds, against the plan: a row a precision."""
    heads = ["weights", "planned, MB", "resident, MB", "apart", "tensors, MB", "highest while loading, GB"]
    rows, body = read("cpu/memory.jsonl"), []
    for row in rows:
        planned, found, held = (f"{row[key] / 1e6:.1f}" for key in ("planned", "weight_bytes", "decoder"))
        body.append(
            [row["weights"], planned, found, f"{row['over']:+.1%}", held, f"{row['peak_while_loading'] / 1e9:.2f}"]
        )
    first = rows[0]
    return f"{markdown(heads, body)}\n`{first['model']}`, all layers dense. {versions(first)}.\n"


def soak() -> str:
    """How many requests ended, and what was left: a row a run."""
    heads = ["model", "requests", "completed", "given up", "refused (429)", "KV blocks left", "memory, first tenth"]
    rows, body = read("cpu/soak.jsonl"), []
    for row in rows:
        ended, memory = row["clients"], row["memory"]
        counts = [f"{ended.get(name, 0):,}" for name in ("completed", "given up", "status 429")]
        left = f"{row['left']['kv_blocks_used']:.0f}"
        grown = f"{max(memory) - memory[0]:.1f} MiB"
        body.append([f"`{row['model']}`", f"{row['requests']:,}", *counts, left, f"{memory[0]:.0f} MiB", grown])
    first = rows[0]
    return (
        f"{markdown([*heads, 'grown by'], body)}\n{first['together']} requests at once in a queue of "
        f"{first['queue']}, a third of them meant to be given up; memory of the server's process after a tenth of the "
        f"requests, and the most that it grew by afterwards. {versions(first)}.\n"
    )


def overload() -> str:
    """Latency of accepted requests under one and four times the load: a row a load."""
    row = read("cpu/overload.jsonl")[-1]
    heads = ["clients", "completed", "refused (429)", "first token, p50", "p95", "each further token, p50", "p95"]
    body = []
    for name, load in row["loads"].items():
        clients = row["max_sequences"] * int(name.removesuffix("x"))
        times = [f"{load['first_token_s'][q]:.2f} s" for q in ("p50", "p95")]
        times += [f"{1e3 * load['time_per_token_s'][q]:.1f} ms" for q in ("p50", "p95")]
        body.append([str(clients), *(f"{load['ended'].get(end, 0):,}" for end in ("completed", "refused")), *times])
    return (
        f"{markdown(heads, body)}\n`{row['model']}` in {row['dtype']}, {row['device']}, {row['max_sequences']} "
        f"sequences at once and {row['max_queue']} that wait, prompts of {row['prompt']} tokens, {row['tokens']} new "
        f"ones, {row['rounds']} rounds in turn; the wait in the queue is part of the first token's time. "
        f"{versions(row)}.\n"
    )
