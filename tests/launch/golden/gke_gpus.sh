mkdir -p launched
cat >launched/iso-a4fbfb01-5.yaml <<'END'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: iso-a4fbfb01-5
  namespace: default
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
        parallelism: 2
        completions: 2
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
              cloud.google.com/gke-accelerator: nvidia-h100-80gb
            tolerations:
            - key: nvidia.com/gpu
              operator: Exists
            containers:
            - name: train
              image: i
              command:
              - python
              - -m
              - scaling_ldm.main
              - --config
              - experiments/tiny.py
              - --workdir
              - /data/iso
              - --stages
              - train
              - --run
              - '5'
              - --coordinator=iso-a4fbfb01-5-workers-0-0.iso-a4fbfb01-5:8476
              - --num_processes=2
              - --process_id=$(JOB_COMPLETION_INDEX)
              resources:
                limits:
                  nvidia.com/gpu: 8
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
kubectl create --filename=launched/iso-a4fbfb01-5.yaml
