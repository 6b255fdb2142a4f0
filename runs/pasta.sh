#!/usr/bin/env bash
# PASTA end to end, tables and intervals in out/pasta/. Can be stopped and started again: what has finished is skipped. Two jobs at a time.
#   people   of the hidden world W leave a log of picks; user models A and B are fitted to it by EM, on different halves of the people, B of another form
#   agents   IQL, myopic, BC, and IQL that is told types, trained on sessions simulated with A; all before held-out people of W, B and A
#   mixed    IQL on the real sessions (rewards as A sees them), on simulated ones, on both
#   small    the small world of 36 states, whose policies have exact values (tests/test_train_iql.py computes them), and its negative control
# SEEDS="0 1" bash runs/pasta.sh runs fewer seeds; STUDIES="people agents" only some of the parts.
set -euo pipefail
cd "$(dirname "$0")/.."
root=out/pasta
mkdir -p "$root"
. runs/jobs.sh

people() { local s=$1 log=$root/people_$1/sessions
    [ -f $log.jsonl ] || python runs/people.py $root/people_$s --seed=$s --num_users=${PEOPLE:-1000} --num_sessions=4 > /dev/null
    local data="--data=$log.jsonl --embeddings=$log.npz --truth=$log.truth.jsonl --num_steps=80 --lr=.1 --restarts=${RESTARTS:-6}"
    run train_user_model.py A_$s --seed=$s $data --half=a --num_types=4
    run train_user_model.py B_$s --seed=$s $data --half=b --num_types=8 --agg=mean
}
agent() { local name=$1 s=$2; shift 2
    run train_iql.py ${name}_$s --seed=$s --simulator=$root/A_$s --evaluate=world,$root/B_$s --num_steps=${STEPS:-1000} --sim_sessions=${SESSIONS:-6000} --eval_every=0 "$@"
}
for study in ${STUDIES:-people agents mixed small}; do
    case $study in
    people) for s in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do spawn people $s; done; join ;;
    agents) for s in ${SEEDS:-0 1 2 3 4 5 6 7 8 9}; do spawn agent agents $s --method=iql,myopic,bc,oracle; done ;;
    mixed)  for s in ${MIXED_SEEDS:-0 1 2 3 4}; do
                real=$root/people_$s/sessions
                spawn agent real $s --method=iql --data=$real.jsonl --embeddings=$real.npz --reward_source=model
                spawn agent both $s --method=iql --data=$real.jsonl:1,simulated:1 --embeddings=$real.npz --reward_source=model
            done ;;
    small)  shape="--simulator=small --evaluate=small --slate_size=2 --candidates_per_category=1 --max_per_category=1 --images_per_prompt=1 --val_people=20"
            shape="$shape --expectile=.9 --hidden_size=32 --num_layers=1 --lr=3e-3 --rho=.02 --num_steps=2000 --sim_sessions=10000 --eval_every=0 --eval_people=2000"
            for s in ${SMALL_SEEDS:-0 1 2 3 4}; do
                spawn run train_iql.py small_mean_$s --seed=$s $shape --method=iql,myopic,bc
                spawn run train_iql.py small_choice_$s --seed=$s $shape --method=iql --slate_value=choice
                spawn run train_iql.py small_control_$s --seed=$s $shape --method=iql,myopic --novelty=0
            done ;;
    esac
done
join
python runs/pasta_tables.py "$root"
