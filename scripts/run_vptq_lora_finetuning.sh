#!/usr/bin/env bash
# Train LoRA adapters on a packed model and measure it before and after. Without changes: the demo model, quantized first if
# it has not been yet, offline, a few minutes on 2 cores. Set the variables here or in the environment:
#   model_name=outputs/my-llama/.../packed_model original=./my-llama dataset=my_text.jsonl ./scripts/run_vptq_lora_finetuning.sh
# Further flags go straight to `vptq finetune`, and win over the variables: ./scripts/run_vptq_lora_finetuning.sh --steps 1000
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

gpu=${gpu:-0}                                   # GPU to use
model_name=${model_name:-}                      # packed checkpoint; empty: the demo model, quantized here
original=${original:-}                          # what it was quantized from; empty: the demo model
dataset=${dataset:-}                            # training texts: wikitext2, c4, c4-new, self, or paths; empty: c4 (demo: its own)
eval_dataset=${eval_dataset:-}                  # evaluation texts, likewise; empty: none (demo: its held-out text)
output_dir=${output_dir:-outputs}
lora_rank=${lora_rank:-16}
lora_alpha=${lora_alpha:-32}
lora_dropout=${lora_dropout:-0}
target_modules=${target_modules:-}              # such as: q_proj v_proj; empty: all packed linears
learning_rate=${learning_rate:-2e-4}
steps=${steps:-300}
batch_size=${batch_size:-16}
micro_batch_size=${micro_batch_size:-1}
nsamples=${nsamples:-512}
seq_len=${seq_len:-}                            # empty: 2048, or the model's if shorter
seed=${seed:-0}

if [ -z "$model_name" ]; then
    [ -z "$original" ] || { echo "error: model_name is missing: the packed checkpoint of $original" >&2; exit 2; }
    made=("$output_dir"/demo/2bits/*/packed_model)
    [ -d "${made[-1]}" ] || CUDA_VISIBLE_DEVICES=$gpu .venv/bin/vptq quantize --bits 2 --nsamples 32 --output_dir "$output_dir"
    made=("$output_dir"/demo/2bits/*/packed_model)
    model_name=${made[-1]}
    [ "$steps" != 300 ] || { steps=60 nsamples=64 seq_len=${seq_len:-256} micro_batch_size=8 learning_rate=1e-3; }  # small: minutes
fi

words=(
    --mode lora --model_name "$model_name" --output_dir "$output_dir"
    --lora_rank "$lora_rank" --lora_alpha "$lora_alpha" --lora_dropout "$lora_dropout"
    --learning_rate "$learning_rate" --steps "$steps" --batch_size "$batch_size" --micro_batch_size "$micro_batch_size"
    --nsamples "$nsamples" --seed "$seed"
)
[ -n "$original" ] && words+=(--original "$original")
[ -n "$dataset" ] && words+=(--dataset $dataset)
[ -n "$eval_dataset" ] && words+=(--eval_dataset $eval_dataset)
[ -n "$target_modules" ] && words+=(--target_modules $target_modules)
[ -n "$seq_len" ] && words+=(--seq_len "$seq_len")

CUDA_VISIBLE_DEVICES=$gpu .venv/bin/vptq finetune "${words[@]}" "$@"
