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
{{- mustMergeOverwrite (deepCopy .Values.config.router) $own | toYaml -}}
{{- end -}}

{{/* (root, pool) */}}
{{- define "baton.workerConfig" -}}
{{- $port := ternary 7100 0 (eq .root.Values.runtime "kubernetes") -}}
{{- $own := dict
  "role" .pool
  "model_name" .root.Values.model.name
  "host" "0.0.0.0"
  "port" $port
  "engine" (dict "model_path" (include "baton.modelPath" .root))
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
{{- end -}}
