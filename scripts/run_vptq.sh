#!/usr/bin/env bash
# Quantize a model and measure it before and after. Without changes: the demo model, offline, a minute or two on 2 cores.
# The variables are those of the reference's script; set them here or in the environment: model_name=./my-llama ./scripts/run_vptq.sh
# Further flags go straight to `vptq quantize`, and win over the variables: ./scripts/run_vptq.sh --kiter 50
# For a file of configs/ call `vptq quantize --config FILE` itself: the variables here would win over the file.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

gpu=${gpu:-0}                                   # GPUs to use: gpu=0,1 num_gpu=2 ./scripts/run_vptq.sh
num_gpu=${num_gpu:-1}                           # how many of them; worker processes on a machine without GPUs
model_name=${model_name:-}                      # empty: the demo model in the package
dataset=${dataset:-}                            # calibration text: wikitext2, c4, c4-new, or a path; empty: c4 (demo: its own)
eval_dataset=${eval_dataset:-}                  # evaluation text, likewise; empty: none (demo: its held-out text)
hessian_path=${hessian_path:-}                  # folder that keeps Hessians; empty: none
output_dir=${output_dir:-outputs}
vector_lens=${vector_lens:--1 4}                # outlier, main
num_centroids=${num_centroids:--1 256}          # outlier, main
num_res_centroids=${num_res_centroids:--1 -1}   # outlier, main
npercent=${npercent:-0}
group_num=${group_num:-1}
vector_quant_dim=${vector_quant_dim:-out}
enable_transpose=${enable_transpose:-True}
bitwidth=${bitwidth:-16}
kmeans_mode=${kmeans_mode:-hessian}
kiter=${kiter:-100}
ktol=${ktol:-1e-5}
nsamples=${nsamples:-128}
blocksize=${blocksize:-128}

words=(
    --output_dir "$output_dir"
    --vector_lens $vector_lens --num_centroids $num_centroids --num_res_centroids $num_res_centroids
    --npercent "$npercent" --group_num "$group_num" --bitwidth "$bitwidth" --blocksize "$blocksize"
    --vector_quant_dim "$vector_quant_dim" --enable_transpose "$enable_transpose"
    --kmeans_mode "$kmeans_mode" --kiter "$kiter" --ktol "$ktol" --nsamples "$nsamples"
    --num_gpus "$num_gpu" --enable_norm --enable_perm --save_model --save_packed_model
)
[ -n "$model_name" ] && words+=(--model_name "$model_name")
[ -n "$dataset" ] && words+=(--dataset "$dataset")
[ -n "$eval_dataset" ] && words+=(--eval_dataset "$eval_dataset")
[ -n "$hessian_path" ] && words+=(--hessian_path "$hessian_path")

CUDA_VISIBLE_DEVICES=$gpu .venv/bin/vptq quantize "${words[@]}" "$@"
