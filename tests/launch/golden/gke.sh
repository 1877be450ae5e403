mkdir -p launched
cat >launched/iso-queue.yaml <<'END'
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata:
  name: tpus
spec:
  nodeLabels:
    cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
    cloud.google.com/gke-tpu-topology: 4x4
    cloud.google.com/gke-spot: 'true'
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata:
  name: tpus
spec:
  namespaceSelector: {}
  resourceGroups:
  - coveredResources:
    - google.com/tpu
    flavors:
    - name: tpus
      resources:
      - name: google.com/tpu
        nominalQuota: 32
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata:
  name: tpus
  namespace: default
spec:
  clusterQueue: tpus
END
kubectl apply --filename=launched/iso-queue.yaml
mkdir -p launched
cat >launched/iso-5.yaml <<'END'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: iso-5
  namespace: default
  labels:
    kueue.x-k8s.io/queue-name: tpus
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  ttlSecondsAfterFinished: 86400
  failurePolicy:
    maxRestarts: 100
    rules:
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons:
      - PodFailurePolicy
      onJobFailureMessagePatterns:
      - exit code 75\b
      - DisruptionTarget
    - name: hopeless
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: 4
        completions: 4
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values:
              - 75
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values:
              - 1
              - 2
              - 3
              - 5
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x4
              cloud.google.com/gke-spot: 'true'
            tolerations:
            - key: google.com/tpu
              operator: Exists
            - key: cloud.google.com/gke-spot
              operator: Exists
            containers:
            - name: train
              image: example/ldm:1
              command:
              - python
              - -m
              - scaling_ldm.main
              - --config
              - experiments/tiny.py
              - --workdir
              - /data/iso
              - --config.plan.axes=(("optimizer.learning_rate", (1e-3, 3e-4)),)
              - --config.question=it's "one" of $$HOME, `id`, $$$$, $$(JOB_COMPLETION_INDEX), {no}
              - --config.generate.captions=('a cat', )
              - --stages
              - train
              - --run
              - '5'
              resources:
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: study
                mountPath: /data
              - name: memory
                mountPath: /dev/shm
            volumes:
            - name: study
              persistentVolumeClaim:
                claimName: studies
            - name: memory
              emptyDir:
                medium: Memory
END
kubectl create --filename=launched/iso-5.yaml
