{{/* Names, labels, images; what several templates need alike. */}}

{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: Ray and the kinds below add their own ends. */}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "baton.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "baton.selector" -}}
app.kubernetes.io/name: {{ include "baton.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: baton
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "baton.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.secretName" -}}
{{- default (printf "%s-secrets" (include "baton.fullname" .)) .Values.secrets.existingSecret -}}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* "true" where routers and workers have a Redis. */}}
{{- define "baton.hasRedis" -}}
{{- if or .Values.redis.enabled .Values.redis.externalUrl -}}true{{- end -}}
{{- end -}}

{{/* Derived, so that one secret is enough to start with. */}}
{{- define "baton.redisPassword" -}}
{{- printf "%s/redis" .Values.secrets.clusterSecret | sha256sum -}}
{{- end -}}

{{- define "baton.redisUrl" -}}
{{- if .Values.redis.enabled -}}
{{- printf "redis://:%s@%s-redis:6379/0" (include "baton.redisPassword" .) (include "baton.fullname" .) -}}
{{- else -}}
{{- .Values.redis.externalUrl -}}
{{- end -}}
{{- end -}}

{{/* (root, pool): the device that the settings of the pool choose. */}}
{{- define "baton.device" -}}
{{- $pool := index .root.Values.config .pool -}}
{{- default "cpu" (dig "engine" "device" "cpu" $pool) -}}
{{- end -}}

{{/* (root, pool): GPUs of one worker. */}}
{{- define "baton.gpusPerWorker" -}}
{{- if eq (include "baton.device" .) "cuda" -}}
{{- dig "engine" "tp_size" 1 (index .root.Values.config .pool) | int -}}
{{- else -}}0{{- end -}}
{{- end -}}

{{/* GPUs of one pod with workers of both pools. */}}
{{- define "baton.gpusPerPair" -}}
{{- $prefill := include "baton.gpusPerWorker" (dict "root" . "pool" "prefill") | int -}}
{{- $decode := include "baton.gpusPerWorker" (dict "root" . "pool" "decode") | int -}}
{{- add (mul $prefill .Values.pools.paired.prefill) (mul $decode .Values.pools.paired.decode) -}}
{{- end -}}

{{/* (root, pool): seconds a worker may drain. 20 is the program's own default. */}}
{{- define "baton.drainSeconds" -}}
{{- dig "drain_s" 20 (index .root.Values.config .pool) | float64 | ceil | int -}}
{{- end -}}

{{- define "baton.pairDrainSeconds" -}}
{{- $prefill := include "baton.drainSeconds" (dict "root" . "pool" "prefill") | int -}}
{{- $decode := include "baton.drainSeconds" (dict "root" . "pool" "decode") | int -}}
{{- max $prefill $decode -}}
{{- end -}}

{{/* Seconds that a stopping router lets streams go on. */}}
{{- define "baton.routerGraceSeconds" -}}
{{- dig "edge" "stop_grace_s" 2 .Values.config.router | float64 | ceil | int -}}
{{- end -}}

{{/* (root, class, own): the priority class of a pod, its own name first. */}}
{{- define "baton.priorityClass" -}}
{{- if .own -}}
{{- .own -}}
{{- else if .root.Values.priorityClasses.create -}}
{{- printf "%s-%s" (include "baton.fullname" .root) .class -}}
{{- end -}}
{{- end -}}
