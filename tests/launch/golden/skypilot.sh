mkdir -p launched
cat >launched/iso-5.yaml <<'END'
name: iso-5
workdir: .
num_nodes: 2
resources:
  accelerators: H100:8
  use_spot: true
  job_recovery:
    recover_on_exit_codes:
    - 75
volumes:
  /data: studies
setup: pip install -e .
run: |
  lost=0
  while true; do
    python -m scaling_ldm.main --config experiments/tiny.py --workdir /data/iso '--config.plan.axes=(("optimizer.learning_rate", (1e-3, 3e-4)),)' '--config.question=it'"'"'s "one" of $HOME, `id`, $$, $(JOB_COMPLETION_INDEX), {no}' '--config.generate.captions=('"'"'a cat'"'"', )' --stages train --run 5 --coordinator="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476" --num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"
    status=$?
    lost=$((lost + 1))
    if [ "$status" != 4 ] || [ "$lost" -gt 100 ]; then exit "$status"; fi
    sleep 20
  done
END
sky jobs launch --yes --detach-run --name=iso-5 launched/iso-5.yaml
