#!/usr/bin/env bash
# The balance pass, the other meaning of "calibration tuning": after RL on one track, a short last SFT at less than a third of that stage's rate wins back
# what the other track lost. Accepted if the chat score is back where it was before RL (within a standard error), and no logic score fell by more than
# one, paired over problems. Two processes at a time; under 10 minutes on 2 cores for 3 seeds after runs/parallel_rl.sh, whose models it starts from.
#     bash runs/balance.sh                              SEEDS="0 1 2" STEPS=60 bash runs/balance.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2"} STEPS=${STEPS:-60}
from=out/parallel_rl root=out/balance
mkdir -p $root
source runs/jobs.sh
# the chat demonstrations of the SFT before RL, with some word problems so that these stay; .3 times that SFT's rates, well below one epoch
balance() {
    if [ ! -e $from/careless_s$1.jsonl ]; then python runs/careless.py $from/careless_s$1.jsonl --share=.7 --seed=$1 > /dev/null; fi
    train balanced_s$1 $shape --seed=$1 --init=$from/grpo_logic_s$1 --data=toy/math_en,chat=$from/careless_s$1.jsonl --mix=math_en:.3,chat:.7 \
        --num_steps=$STEPS --lr=9e-4 --muon_lr=6e-3 --decay_share=.5
    if [ ! -e $root/eval_s$1/eval.json ]; then
        python eval.py --init=$from/start_s$1,$from/grpo_logic_s$1,$root/balanced_s$1 --tasks=math_en,math_en@test_template,chat_en --num_problems=200 \
            --out=$root/eval_s$1 > $root/eval_s$1.log 2>&1 || { tail -n 5 $root/eval_s$1.log; exit 1; }
    fi
}
for seed in $SEEDS; do spawn balance $seed; done
join
python runs/balance_table.py $root/eval_s*/eval.json
