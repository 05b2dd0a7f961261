{{/*
The settings files of the processes: what values say, and over it what only the chart knows. Secrets and addresses of
pods come as environment (`_pods.tpl`).
*/}}

{{- define "baton.modelPath" -}}
{{- printf "/models/%s" .Values.model.path | clean -}}
{{- end -}}

{{- define "baton.tlsConfig" -}}
{{- if .Values.tls.enabled -}}
ca_file: /etc/baton-tls/ca.crt
cert_file: /etc/baton-tls/tls.crt
key_file: /etc/baton-tls/tls.key
name: {{ .Values.tls.name | quote }}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{- define "baton.routerConfig" -}}
{{- $tenants := dict -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- $_ := set $tenants "keys_file" "/etc/baton-keys/keys.json" -}}
{{- end -}}
{{- if .Values.apiKeys.require -}}
{{- $_ := set $tenants "require_key" true -}}
{{- end -}}
{{- $edge := dict -}}
{{- if .Values.frontDoorTls.enabled -}}
{{- $tls := dict "cert_file" "/etc/baton-door-tls/tls.crt" "key_file" "/etc/baton-door-tls/tls.key" -}}
{{- if .Values.frontDoorTls.requireClientCertificate -}}
{{- $_ := set $tls "client_ca_file" "/etc/baton-door-tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $edge "tls" $tls -}}
{{- end -}}
{{- $place := "redis" -}}
{{- if not (include "baton.hasRedis" .) -}}{{- $place = "ray" -}}{{- end -}}
{{- $own := dict
  "model_path" (include "baton.modelPath" .)
  "model_name" .Values.model.name
  "host" "0.0.0.0"
  "http_port" (int .Values.router.httpPort)
  "grpc_port" (int .Values.router.grpcPort)
  "copy" (dict "own_port" (int .Values.router.metricsPort))
  "shared" (dict "place" $place "deployment" (include "baton.fullname" .))
  "tenants" $tenants
  "edge" $edge
  "tls" (include "baton.tlsConfig" . | fromYaml)
-}}
{{- if .Values.planner.enabled -}}
{{- $_ := set $own "pool_stats" (pick (dig "autoscale" dict .Values.config.planner) "ttft_s" "itl_s") -}}
{{- end -}}
{{- mustMergeOverwrite (deepCopy .Values.config.router) $own | toYaml -}}
{{- end -}}

{{/* Devices of a worker: its ranks. (root, pool) */}}
{{- define "baton.workerDevices" -}}
{{- dig "engine" "tp_size" 1 (index .root.Values.config .pool) | int -}}
{{- end -}}

{{- define "baton.plannerConfig" -}}
{{- $prefill := include "baton.workerDevices" (dict "root" . "pool" "prefill") | int -}}
{{- $decode := include "baton.workerDevices" (dict "root" . "pool" "decode") | int -}}
{{- $models := dict "prefill_tensor_parallel" $prefill "decode_tensor_parallel" $decode -}}
{{- if .Values.planner.profile -}}
{{- $_ := set $models "profile" "/etc/baton/profile.json" -}}
{{- end -}}
{{- $own := dict
  "host" "0.0.0.0"
  "port" (int .Values.planner.metricsPort)
  "models" $models
  "autoscale" (dict "prefill" (dict "devices_per_worker" $prefill) "decode" (dict "devices_per_worker" $decode))
  "stats" (dict "routers" (list (printf "dns://%s-metrics:%d" (include "baton.fullname" .) (int .Values.router.metricsPort))))
  "decisions" (dict "path" "/tmp/baton/decisions.jsonl")
-}}
{{- mustMergeOverwrite (deepCopy .Values.config.planner) $own | toYaml -}}
{{- end -}}

{{/* (root, pool) */}}
{{- define "baton.workerConfig" -}}
{{- $other := index .root.Values.config (ternary "decode" "prefill" (eq .pool "prefill")) -}}
{{- $port := ternary 7100 0 (eq .root.Values.runtime "kubernetes") -}}
{{- $own := dict
  "role" .pool
  "model_name" .root.Values.model.name
  "host" "0.0.0.0"
  "port" $port
  "engine" (dict "model_path" (include "baton.modelPath" .root))
  "other_engine" (mustMerge (dict "model_path" (include "baton.modelPath" .root)) (dig "engine" dict $other))
  "registry" (dict "directory" "/tmp/baton/registry" "directory_is_local" true "deployment" (include "baton.fullname" .root))
  "tls" (include "baton.tlsConfig" .root | fromYaml)
-}}
{{- mustMergeOverwrite (deepCopy (index .root.Values.config .pool)) $own | toYaml -}}
{{- end -}}

{{- define "baton.settings" -}}
router.yaml: |
{{ include "baton.routerConfig" . | indent 2 }}
prefill.yaml: |
{{ include "baton.workerConfig" (dict "root" . "pool" "prefill") | indent 2 }}
decode.yaml: |
{{ include "baton.workerConfig" (dict "root" . "pool" "decode") | indent 2 }}
{{- if .Values.planner.enabled }}
planner.yaml: |
{{ include "baton.plannerConfig" . | indent 2 }}
{{- with .Values.planner.profile }}
profile.json: {{ . | quote }}
{{- end }}
{{- end }}
{{- end -}}
