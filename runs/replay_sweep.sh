#!/usr/bin/env bash
# How much replay is enough? Mid-training on English reasoning from one base per seed, the same new documents in every arm, r = 0 to .20.
# Then SFT from the base, and in half the steps from a model mid-trained with r = .20. Tables in out/replay_sweep/. Two processes at a time;
# about an hour on 2 cores for 3 seeds. Finished runs are kept, so that the script can be started again.
#     bash runs/replay_sweep.sh                      SEEDS="0 1 2" NEW_TOKENS=800000 bash runs/replay_sweep.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2"} NEW_TOKENS=${NEW_TOKENS:-500000} SFT_STEPS=${SFT_STEPS:-260}
root=out/replay_sweep
mkdir -p $root
source runs/jobs.sh
sft="$shape --decay_share=.3 --data=toy --mix=math_en:.4,math_ko:.2,code:.12,tool:.14,chat_en:.07,chat_ko:.07"

for seed in $SEEDS; do spawn base $seed; done
join
mid() { train mid_r$1_s$2 $shape --seed=$2 --init=$root/base_s$2 --data=toy/reasoning --replay_data=$old --replay=$1 --mix=$oldmix --new_tokens=$NEW_TOKENS; }
for seed in $SEEDS; do for r in .20 .05 .01 0; do spawn mid $r $seed; done; done
for seed in $SEEDS; do spawn mid_varied $seed; done
join
for seed in $SEEDS; do
    spawn train sft_mid_s$seed --seed=$seed --init=$root/mid_varied_s$seed $sft --num_steps=$((SFT_STEPS / 2))
    spawn train sft_base_s$seed --seed=$seed --init=$root/base_s$seed $sft --num_steps=$SFT_STEPS
done
join
evaluate() { python eval.py --out=$root/eval_$1 "${@:2}" > "$root/eval_$1.log" 2>&1 || { tail -n 5 "$root/eval_$1.log"; exit 1; }; }
for seed in $SEEDS; do
    mids=$(for r in 0 .01 .05 .20; do printf ",$root/mid_r${r}_s$seed"; done)
    spawn evaluate mid_s$seed --init=$root/base_s$seed$mids --max_bytes=40000 --tasks=bpb:stdlib,facts_en,facts_ko,reasoning,reasoning@test_template
    spawn evaluate sft_s$seed --init=$root/sft_base_s$seed,$root/sft_mid_s$seed \
        --tasks=math_en,math_en@test_template,math_ko,code,tool,chat_en,chat_ko
done
join
python runs/seeds_table.py $root/eval_mid_s? $root/eval_sft_s?
