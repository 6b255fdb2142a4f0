#!/usr/bin/env bash
# Does the confidence of an RL-trained model mean what it says? Per seed: SFT on word problems in two languages and on instructions, RL on the English
# ones, then calibration-tuning of that model's answers, tested on the same kinds of prompts, other wording, Korean, and a level left out. For RLCR, the
# same model learns to state a confidence in words (SFT on random ones), then RL with the RLCR reward beside RL with plain grades at equal rollouts.
# Two processes at a time; some 80 minutes (an estimate) on 2 cores for 5 and 3 seeds after runs/replay_sweep.sh, whose models it starts from (else it trains them).
#     bash runs/calibration.sh                          SEEDS="0 1 2 3 4" RLCR="0 1 2" bash runs/calibration.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2 3 4"} RLCR=${RLCR:-"0 1 2"}
root=out/replay_sweep
mkdir -p $root out/calibration
source runs/jobs.sh
for seed in $SEEDS; do spawn base $seed; done
join
for seed in $SEEDS; do spawn mid_varied $seed; done
join
sweep=$root root=out/calibration

rl="--data=logic=math_en,chat=chat_en --prompts_per_step=32 --track_mix=logic:1,chat:2 --num_steps=30 --lr=1e-3 --eval_every=1000 --eval_problems=150 --preflight=0"
tested="--data=math_en,chat_en --num_prompts=400 --fit_share=.15 --test_share=.25 --num_resamples=1000"
trained() {
    python runs/careless.py $root/careless_s$1.jsonl --share=.6 --seed=$1 > /dev/null
    run train_sft.py start_s$1 $shape --seed=$1 --init=$sweep/mid_varied_s$1 --data=toy/math_en,toy/math_ko,chat=$root/careless_s$1.jsonl \
        --mix=math_en:.035,math_ko:.055,chat:.91 --num_steps=240 --decay_share=.3
    run train_rl.py rl_s$1 --seed=$1 --init=$root/start_s$1 $rl --eval_tasks=math_ko,math_en@test_template
    run train_calibration.py ct_s$1 --seed=$1 --init=$root/rl_s$1 $tested --hold_out_levels=4 --ood=math_en@test_template,math_ko --num_ood=80 --num_steps=240
}
rlcr() {                                              # SEED; measured on other prompts than those whose answers taught the form
    python runs/stated.py $root/ct_s$1/graded $root/stated_s$1.jsonl --seed=$1 > /dev/null
    run train_sft.py states_s$1 $shape --seed=$1 --init=$root/rl_s$1 --data=$root/stated_s$1.jsonl --num_steps=120 --decay_share=.5
    run train_rl.py rlcr_s$1 --seed=$1 --init=$root/states_s$1 $rl --rewards=rlcr
    run train_rl.py rlvr_s$1 --seed=$1 --init=$root/states_s$1 $rl --rewards=grader,rlcr:0
    for name in rlcr rlvr; do
        run train_calibration.py words_${name}_s$1 --seed=$(($1 + 1000)) --init=$root/${name}_s$1 $tested --method=none --source=verbal
    done
}
for seed in $SEEDS; do spawn trained $seed; done
join
for seed in $RLCR; do spawn rlcr $seed; done
join
python runs/calibration_table.py $root --seeds="$SEEDS" --rlcr="$RLCR"
