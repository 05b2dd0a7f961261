{{/*
What the schema cannot say: values that contradict each other. Each message names the key, what it got and the limit.
*/}}
{{- define "baton.validate" -}}
{{- $v := .Values -}}
{{- $roots := dict "prefill" (dict "root" . "pool" "prefill") "decode" (dict "root" . "pool" "decode") -}}
{{- include "baton.validateSecrets" . -}}
{{- if and (eq $v.runtime "kubernetes") (not (include "baton.hasRedis" .)) -}}
{{- fail "runtime kubernetes needs Redis, by which workers are found: set redis.enabled: true or redis.externalUrl" -}}
{{- end -}}
{{- if and (eq $v.runtime "kubernetes") (eq $v.pools.layout "paired") -}}
{{- fail "pools.layout paired needs runtime ray: its pods hold several workers" -}}
{{- end -}}
{{- if and $v.keda.enabled (ne $v.runtime "kubernetes") -}}
{{- fail "keda.enabled needs runtime kubernetes: the sizes of Ray's pools stand in the serve config" -}}
{{- end -}}
{{- include "baton.validatePlanner" . -}}
{{- if and $v.ray.head.faultTolerance (not (include "baton.hasRedis" .)) -}}
{{- fail "ray.head.faultTolerance needs Redis: set redis.enabled: true or redis.externalUrl" -}}
{{- end -}}
{{- range $name := list "prefill" "decode" -}}
{{- $keda := index $v.keda $name -}}
{{- if gt (int $keda.minReplicas) (int $keda.maxReplicas) -}}
{{- fail (printf "keda.%s.minReplicas %d is above keda.%s.maxReplicas %d" $name (int $keda.minReplicas) $name (int $keda.maxReplicas)) -}}
{{- end -}}
{{- include "baton.validatePool" (dict "root" $ "pool" $name) -}}
{{- end -}}
{{- range $key, $default := dict "device" "cpu" "block_size" "" "kv_cache_dtype" "auto" "load_format" "auto" "dtype" "bfloat16" "revision" "" -}}
{{- $prefill := dig "engine" $key $default $v.config.prefill | toString -}}
{{- $decode := dig "engine" $key $default $v.config.decode | toString -}}
{{- if ne $prefill $decode -}}
{{- fail (printf "config.prefill.engine.%s is %q and config.decode.engine.%s %q: such pools cannot exchange KV; make them equal" $key $prefill $key $decode) -}}
{{- end -}}
{{- end -}}
{{- $needed := include "baton.gpusPerPair" . | int -}}
{{- if and (eq $v.pools.layout "paired") (gt $needed (int $v.gpu.maxPerNode)) -}}
{{- fail (printf "a pod of pools.paired needs %d GPUs and gpu.maxPerNode is %d: lower pools.paired.prefill, pools.paired.decode or engine.tp_size" $needed (int $v.gpu.maxPerNode)) -}}
{{- end -}}
{{- if ge (int64 $v.fabric.sharedMemory.rayObjectStoreBytes) (include "baton.bytes" $v.fabric.sharedMemory.sizeLimit | int64) -}}
{{- fail (printf "fabric.sharedMemory.rayObjectStoreBytes %d does not fit into fabric.sharedMemory.sizeLimit %s" (int64 $v.fabric.sharedMemory.rayObjectStoreBytes) $v.fabric.sharedMemory.sizeLimit) -}}
{{- end -}}
{{- include "baton.validateModel" . -}}
{{- include "baton.validateMemory" . -}}
{{- if and $v.monitoring.serviceMonitor.enabled $v.monitoring.podMonitor.enabled -}}
{{- fail "monitoring.serviceMonitor.enabled and monitoring.podMonitor.enabled are both set: every router would be counted twice" -}}
{{- end -}}
{{- if and $v.gateway.enabled (not $v.gateway.parentRefs) -}}
{{- fail "gateway.enabled needs gateway.parentRefs: the gateways to attach to" -}}
{{- end -}}
{{- end -}}

{{- define "baton.validatePlanner" -}}
{{- $v := .Values -}}
{{- if and (eq $v.keda.follow "planner") (not $v.planner.enabled) -}}
{{- fail "keda.follow planner needs planner.enabled: nobody else says how many workers are wanted" -}}
{{- end -}}
{{- if $v.planner.enabled -}}
{{- if dig "autoscale" "can_change_roles" false $v.config.planner -}}
{{- fail "config.planner.autoscale.can_change_roles: a pod or a replica belongs to its pool; leave it out" -}}
{{- end -}}
{{- if eq $v.runtime "ray" -}}
{{- if eq $v.pools.layout "paired" -}}
{{- fail "planner.enabled with runtime ray needs pools.layout separate: a pair's workers cannot come one by one" -}}
{{- end -}}
{{- if not $v.config.planner.autoscale -}}
{{- fail "planner.enabled needs config.planner.autoscale.ttft_s: the seconds that are to be kept" -}}
{{- end -}}
{{- range $pool := list "prefill" "decode" -}}
{{- $limits := dig "autoscale" $pool dict $v.config.planner -}}
{{- $num := (index $v.pools $pool).replicas | int -}}
{{- if or (lt $num (dig "min_workers" 1 $limits | int)) (gt $num (dig "max_workers" 8 $limits | int)) -}}
{{- fail (printf "pools.%s.replicas is %d, outside min_workers and max_workers of config.planner.autoscale.%s" $pool $num $pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $autoscale := dig "autoscale" dict $v.config.planner -}}
{{- range $key := list "ttft_s" "itl_s" -}}
{{- if not (index $autoscale $key) -}}
{{- fail (printf "planner.enabled needs config.planner.autoscale.%s: the seconds that are to be kept" $key) -}}
{{- end -}}
{{- end -}}
{{- $models := dig "models" dict $v.config.planner -}}
{{- $isPredicted := and $models.model $models.machine -}}
{{- if and (not $v.planner.profile) (not $isPredicted) -}}
{{- fail "planner.enabled needs figures of a worker: planner.profile, or config.planner.models.model and machine" -}}
{{- end -}}
{{- if and $v.planner.profile (or $models.model $models.machine) -}}
{{- fail "planner.profile and config.planner.models.model or machine are set: figures come from one source" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.validateSecrets" -}}
{{- $v := .Values -}}
{{- if not (or $v.secrets.existingSecret $v.secrets.clusterSecret) -}}
{{- fail "secrets.clusterSecret or secrets.existingSecret is missing; make one with `openssl rand -hex 32`" -}}
{{- end -}}
{{- if and $v.tls.enabled (not $v.tls.existingSecret) -}}
{{- fail "tls.enabled needs tls.existingSecret, with ca.crt, tls.crt and tls.key" -}}
{{- end -}}
{{- if and $v.frontDoorTls.enabled (not $v.frontDoorTls.existingSecret) -}}
{{- fail "frontDoorTls.enabled needs frontDoorTls.existingSecret, with tls.crt and tls.key" -}}
{{- end -}}
{{- if and $v.frontDoorTls.enabled (ne $v.runtime "kubernetes") -}}
{{- fail "frontDoorTls.enabled needs runtime kubernetes: with ray the proxies of Ray Serve take HTTP on every node; let an ingress or gateway end TLS" -}}
{{- end -}}
{{- if and $v.frontDoorTls.requireClientCertificate (not $v.frontDoorTls.enabled) -}}
{{- fail "frontDoorTls.requireClientCertificate needs frontDoorTls.enabled" -}}
{{- end -}}
{{- with dig "tracing" "otlp_endpoint" "" $v.config.router -}}
{{- if and $v.networkPolicy.enabled (not (regexMatch ":[0-9]+$" (urlParse .).host)) -}}
{{- fail (printf "config.router.tracing.otlp_endpoint %s names no port, which networkPolicy opens; write it like http://collector.monitoring:4317" .) -}}
{{- end -}}
{{- end -}}
{{- if and $v.redis.enabled $v.redis.externalUrl -}}
{{- fail "redis.enabled and redis.externalUrl are both set; there is one Redis" -}}
{{- end -}}
{{- end -}}

{{/* (root, pool) */}}
{{- define "baton.validatePool" -}}
{{- $v := .root.Values -}}
{{- $tp := dig "engine" "tp_size" 1 (index $v.config .pool) | int -}}
{{- range $key := list "numAttentionHeads" "numKvHeads" -}}
{{- $heads := index $v.model $key -}}
{{- if $heads -}}
{{- if ne (mod (int $heads) $tp) 0 -}}
{{- fail (printf "config.%s.engine.tp_size %d does not divide model.%s %d" $.pool $tp $key (int $heads)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq (include "baton.device" .) "cuda") (eq $v.pools.layout "separate") -}}
{{- fail (printf "config.%s.engine.device is cuda and pools.layout separate: GPUs exchange KV within one pod only; set pools.layout: paired and runtime: ray" .pool) -}}
{{- end -}}
{{- end -}}

{{/* What lies in memory fits into it. */}}
{{- define "baton.validateMemory" -}}
{{- $v := .Values -}}
{{- $shm := $v.fabric.sharedMemory.sizeLimit -}}
{{- range $name := ternary (list "paired") (list "prefill" "decode") (eq $v.pools.layout "paired") -}}
{{- $limit := (index $v.pools $name).resources.limits.memory -}}
{{- if ge (include "baton.bytes" $shm | int64) (include "baton.bytes" $limit | int64) -}}
{{- fail (printf "fabric.sharedMemory.sizeLimit %s does not fit into pools.%s.resources.limits.memory %s, of which it is a part" $shm $name (toString $limit)) -}}
{{- end -}}
{{- end -}}
{{- range $pool := list "prefill" "decode" -}}
{{- $kv := dig "engine" "kv_cache_bytes" 0 (index $v.config $pool) | int64 -}}
{{- $section := ternary "paired" $pool (eq $v.pools.layout "paired") -}}
{{- $limit := (index $v.pools $section).resources.limits.memory -}}
{{- $isCpu := eq (include "baton.device" (dict "root" $ "pool" $pool)) "cpu" -}}
{{- if and $isCpu (ge $kv (include "baton.bytes" $limit | int64)) -}}
{{- fail (printf "config.%s.engine.kv_cache_bytes %d does not fit into pools.%s.resources.limits.memory %s" $pool $kv $section (toString $limit)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "baton.validateModel" -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "image") (not $model.image.reference) -}}
{{- fail "model.source image needs model.image.reference" -}}
{{- end -}}
{{- if and (eq $model.source "fetch") (not (and $model.fetch.image $model.fetch.command)) -}}
{{- fail "model.source fetch needs model.fetch.image and model.fetch.command" -}}
{{- end -}}
{{- end -}}

{{/* A quantity such as 2Gi, 1.5G or 500000000 as a number. */}}
{{- define "baton.bytes" -}}
{{- if kindIs "string" . -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "k" 1000 "K" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "P" 1000000000000000 "" 1 -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" . -}}
{{- $unit := trimPrefix $number . -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "%q is no amount of memory; write it like 16Gi" .) -}}
{{- end -}}
{{- mulf ($number | float64) (index $units $unit) | int64 -}}
{{- else -}}
{{- . | int64 -}}
{{- end -}}
{{- end -}}
