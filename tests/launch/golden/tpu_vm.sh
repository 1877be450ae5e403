mkdir -p launched
cat >launched/iso-5.sh <<'END'
#!/bin/bash
# Row 5 of /data/iso, on every host of the TPU.
export HOME="${HOME:-/root}"
fact() {
  curl -sf -H 'Metadata-Flavor: Google' --retry 5 \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
if ! hosts=$(fact worker-network-endpoints) || ! host=$(fact agent-worker-number); then
  echo "the metadata server does not say which host this is"; exit 1
fi
first=${hosts%%,*}
count=$(tr ',' '\n' <<<"$hosts" | grep -c .)
job=()
if [ "$count" -gt 1 ]; then
  job=("--coordinator=${first##*:}:8476")
  job+=("--num_processes=$count" "--process_id=$host")
fi
setup() {
mount /data && cd /data/code
}
if ! setup; then echo "setup failed"; exit 1; fi
lost=0
while true; do
  python -m scaling_ldm.main --config experiments/tiny.py --workdir /data/iso '--config.plan.axes=(("optimizer.learning_rate", (1e-3, 3e-4)),)' '--config.question=it'"'"'s "one" of $HOME, `id`, $$, $(JOB_COMPLETION_INDEX), {no}' '--config.generate.captions=('"'"'a cat'"'"', )' --stages train --run 5 "${job[@]}"
  status=$?
  if [ "$status" = 4 ]; then
    lost=$((lost + 1))
    if [ "$lost" -gt 100 ]; then break; fi
  elif [ "$status" != 75 ]; then
    break
  fi
  sleep 20
done
echo "row 5 ended with $status"
if [ "$status" = 0 ]; then
  gcloud compute tpus queued-resources delete iso-5 --force --quiet --async --zone=us-central2-b
fi
exit "$status"
END
gcloud compute tpus queued-resources create iso-5 --node-id=iso-5 --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot --metadata-from-file=startup-script=launched/iso-5.sh --zone=us-central2-b
