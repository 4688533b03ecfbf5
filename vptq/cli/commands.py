"""The commands: where each is, and what it does in a line."""

COMMANDS = {
    "quantize": ("vptq.cli.quantize", "quantize a model: calibration, codebooks, checkpoint, perplexity"),
    "finetune": ("vptq.cli.finetune", "fine-tune a packed checkpoint: block by block, end to end, or with adapters"),
    "plan": ("vptq.cli.plan", "what a run will do and take: bits, time, memory, disk, and all that is wrong, at once"),
    "eval-ppl": ("vptq.cli.eval_ppl", "perplexity of an original, dequantized or packed model"),
    "eval-kl": ("vptq.cli.eval_kl", "how far a quantized model's predictions are from its original's"),
    "eval-tasks": ("vptq.cli.eval_tasks", "zero-shot tasks through lm-eval, packed models included"),
    "generate": ("vptq.cli.generate", "let a model write on, packed models included"),
    "inspect": ("vptq.cli.inspect", "what a packed checkpoint holds: settings, bits and error of every linear; --verify"),
    "report": ("vptq.cli.report", "make report.html of a run folder anew: bits, perplexities, errors along depth, settings"),
    "push": ("vptq.cli.push", "upload a packed checkpoint and its model card to the Hugging Face hub"),
    "doctor": ("vptq.cli.doctor", "look at this machine: packages, GPUs, memory, and a self-test of the kernels"),
    "bits": ("vptq.cli.bits", "bits per weight of a setting, a model or a saved checkpoint"),
    "completion": ("vptq.cli.completion", "what bash, zsh or fish needs to complete commands and flags"),
}
