{{/* Combinations that cannot work: a line each, with the rule, the value and the remedy. values.schema.json holds the types. */}}
{{- define "limaml.wrong" -}}
{{- $config := fromJson (include "limaml.config" .) }}
{{- if hasKey $config "Error" }}
config must be TOML, but: {{ get $config "Error" }}; correct it, or give a file with --set-file config=FILE
{{- else }}
{{- include "limaml.wrongConfig" (list . $config) }}
{{- end }}
{{- include "limaml.wrongScaling" . }}
{{- include "limaml.wrongAccess" . }}
{{- include "limaml.wrongRest" . }}
{{- end }}

{{- define "limaml.wrongConfig" -}}
{{- $ := index . 0 }}
{{- $config := index . 1 }}
{{- $serving := fromJson (include "limaml.serving" $) }}
{{- $feast := default (dict) (get $config "feast") }}
{{- if or (hasPrefix "127." $serving.host) (has $serving.host (list "localhost" "::1")) }}
config: serving.host must be an address that others reach in a pod, got {{ $serving.host }}; set host = "0.0.0.0" in [serving]
{{- end }}
{{- if and (not $serving.token_file) (not $serving.allow_remote_without_token) }}
config: serving.token_file must name the file of a token where the service listens beyond loopback, got none; set token_file = "/run/secrets/limaml/token" in [serving] and secrets.token.name, or allow_remote_without_token = true where something else keeps strangers out
{{- end }}
{{- if and $serving.token_file (not $.Values.secrets.token.name) (not $.Values.secrets.externalSecret.enabled) }}
secrets.token.name must name the Secret with the token of serving.token_file ({{ $serving.token_file }}), got none; create it and name it, or enable secrets.externalSecret
{{- end }}
{{- if and $serving.token_file (or (not (hasPrefix "/" $serving.token_file)) (has (dir $serving.token_file) (list "/" "/etc" "/etc/limaml" "/tmp" "/opt/limaml"))) }}
config: serving.token_file must lie in a folder of its own, got {{ $serving.token_file }}; set token_file = "/run/secrets/limaml/token" in [serving]
{{- end }}
{{- if not $.Values.allowLocalStores }}
{{- $places := list
      (list "storage" "root" ".run/data" "s3://bucket/prefix")
      (list "registry" "tracking_uri" "sqlite:///.run/mlflow/mlflow.db" "http://mlflow:5000")
      (list "registry" "artifact_root" ".run/mlflow/artifacts" "s3://bucket/prefix")
      (list "embeddings" "lease_url" "sqlite:///.run/lease.db" "postgresql+psycopg://USER:${PASSWORD}@HOST/DATABASE") }}
{{- range $places }}
{{- $value := get (default (dict) (get $config (index . 0))) (index . 1) | default (index . 2) }}
{{- if or (hasPrefix "sqlite:" $value) (hasPrefix "file:" $value) (not (contains "://" $value)) }}
config: {{ index . 0 }}.{{ index . 1 }} must be a place that all pods share, got {{ $value }}, which ends with its pod; set one such as {{ index . 3 }}, or allowLocalStores=true where it lies on a volume of all pods
{{- end }}
{{- end }}
{{- if and (ne (get $feast "registry_type" | default "file") "sql") (not (contains "://" (get $feast "registry" | default ".run/feast/registry.db"))) }}
config: feast.registry must be a place that all pods share, got {{ get $feast "registry" | default ".run/feast/registry.db" }}, which ends with its pod; set registry_type = "sql" and a URL, or allowLocalStores=true where it lies on a volume of all pods
{{- end }}
{{- if ne (get $feast "online_store" | default "sqlite") "redis" }}
config: feast.online_store must be redis, got sqlite, which ends with its pod; set online_store = "redis", or allowLocalStores=true where it lies on a volume of all pods
{{- end }}
{{- end }}
{{- if ne (get $feast "online_store" | default "sqlite") "redis" }}
{{- if gt (int $serving.workers) 1 }}
config: serving.workers must be 1 where feast.online_store is sqlite, got {{ int $serving.workers }}: its readers block one another and its writer; set workers = 1, or online_store = "redis"
{{- end }}
{{- if gt (int (include "limaml.maxReplicas" $)) 1 }}
config: feast.online_store must be redis where more than one pod serves, got sqlite and {{ include "limaml.maxReplicas" $ }} pods; set online_store = "redis", or serving.replicas=1 without autoscaling
{{- end }}
{{- end }}
{{- if and (or $.Values.apply.enabled $.Values.airflow.podTemplate.enabled) (not (hasPrefix "/" (get $feast "repo_path" | default "feature_repo"))) }}
config: feast.repo_path must be absolute in a pod, got {{ get $feast "repo_path" | default "feature_repo" }}; set repo_path = "/opt/limaml/feature_repo", where the image has it
{{- end }}
{{- range regexFindAll "\\$\\{[A-Za-z_][A-Za-z0-9_]*\\}" (toJson $config) -1 | uniq }}
{{- $name := trimSuffix "}" (trimPrefix "${" .) }}
{{- if not (hasKey (default (dict) $.Values.secrets.env) $name) }}
secrets.env must have every variable that config refers to, got no {{ $name }}; add secrets.env.{{ $name }} with the name and key of a Secret
{{- end }}
{{- end }}
{{- $needed := addf (int $.Values.serving.preStopSeconds) $serving.timeout_s 10 }}
{{- if le (float64 $.Values.serving.terminationGracePeriodSeconds) $needed }}
serving.terminationGracePeriodSeconds must be > preStopSeconds + config's serving.timeout_s + 10 ({{ $needed }}), got {{ $.Values.serving.terminationGracePeriodSeconds }}; raise it, otherwise requests are cut off
{{- end }}
{{- if and $.Values.autoscaling.keda.enabled (ge (float64 $.Values.autoscaling.keda.inFlightPerPod) (mulf $serving.max_in_flight $serving.workers)) }}
autoscaling.keda.inFlightPerPod must be < serving.max_in_flight * serving.workers ({{ mulf $serving.max_in_flight $serving.workers }}), got {{ $.Values.autoscaling.keda.inFlightPerPod }}; lower it, otherwise pods refuse requests before others are started
{{- end }}
{{- end }}

{{- define "limaml.wrongScaling" -}}
{{- $hpa := .Values.autoscaling.hpa }}
{{- $keda := .Values.autoscaling.keda }}
{{- if and $hpa.enabled $keda.enabled }}
autoscaling.hpa.enabled and autoscaling.keda.enabled must not both be true: KEDA makes an autoscaler of its own, and two fight over one Deployment; set one to false
{{- end }}
{{- if and $hpa.enabled (not (dig "requests" "cpu" "" .Values.serving.resources)) }}
serving.resources.requests.cpu must be set where autoscaling.hpa is enabled, got none: it scales by a share of it; set it, e.g. to 500m
{{- end }}
{{- if and $keda.enabled (not $keda.prometheusAddress) }}
autoscaling.keda.prometheusAddress must name Prometheus where KEDA scales by its metrics, got none; set it, e.g. to http://monitoring-prometheus.monitoring:9090
{{- end }}
{{- if and $keda.enabled (not $keda.query) (not .Values.serviceMonitor.enabled) }}
serviceMonitor.enabled must be true where KEDA scales by requests in flight: its query goes by the labels that the monitor gives; enable it, or set autoscaling.keda.query
{{- end }}
{{- range $name, $scaler := .Values.autoscaling }}
{{- if and $scaler.enabled (gt (int $scaler.minReplicas) (int $scaler.maxReplicas)) }}
autoscaling.{{ $name }}.minReplicas must be <= maxReplicas ({{ $scaler.maxReplicas }}), got {{ $scaler.minReplicas }}; lower it, or raise maxReplicas
{{- end }}
{{- end }}
{{- with .Values.podDisruptionBudget }}
{{- if and .enabled (eq .bound "minAvailable") (not (kindIs "string" .amount)) (ge (int .amount) (int (include "limaml.minReplicas" $))) }}
podDisruptionBudget.amount must be < the fewest pods ({{ include "limaml.minReplicas" $ }}) where they must stay, got {{ .amount }}: no node could ever be drained; lower it, or use bound=maxUnavailable
{{- end }}
{{- end }}
{{- end }}

{{- define "limaml.wrongAccess" -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.hostnames) }}
httpRoute.hostnames must name a host where httpRoute is enabled, got none: without one it takes every host of the Gateway; set it, e.g. to [rank.example.com]
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
httpRoute.parentRefs must name a Gateway where httpRoute is enabled, got none: no Gateway would take it up; set it, e.g. to [{name: public, namespace: gateways}]
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
ingress.hosts must name a host where ingress is enabled, got none: without one it takes every host of the controller; set it, e.g. to [rank.example.com]
{{- end }}
{{- $visitors := list }}
{{- if .Values.httpRoute.enabled }}{{ $visitors = append $visitors "httpRoute" }}{{ end }}
{{- if .Values.ingress.enabled }}{{ $visitors = append $visitors "ingress" }}{{ end }}
{{- if .Values.serviceMonitor.enabled }}{{ $visitors = append $visitors "serviceMonitor" }}{{ end }}
{{- if and .Values.networkPolicy.enabled $visitors (not .Values.networkPolicy.from) }}
networkPolicy.from must admit whoever connects for {{ join ", " $visitors }}, got none, so only pods of this namespace could; add the namespace of the gateway or of Prometheus
{{- end }}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.egress.enabled (not .Values.networkPolicy.egress.to) }}
networkPolicy.egress.to must admit the online store, MLflow, Postgres and the object store where networkPolicy.egress is enabled, got none; add rules for them
{{- end }}
{{- with .Values.secrets.externalSecret }}
{{- if and .enabled (not .storeRef.name) }}
secrets.externalSecret.storeRef.name must name a SecretStore where secrets.externalSecret is enabled, got none; set it
{{- end }}
{{- if and .enabled (not .data) }}
secrets.externalSecret.data must say what is fetched where secrets.externalSecret is enabled, got none; add [{secretKey: token, remoteRef: {key: limaml, property: token}}]
{{- end }}
{{- end }}
{{- range $name, $from := default (dict) .Values.secrets.env }}
{{- if and (not $from.name) (not $.Values.secrets.externalSecret.enabled) }}
secrets.env.{{ $name }}.name must name a Secret, got none; set it, or enable secrets.externalSecret
{{- end }}
{{- end }}
{{- end }}

{{- define "limaml.wrongRest" -}}
{{- if and .Values.airflow.podTemplate.enabled (not .Values.images.train.digest) }}
images.train.digest must be set where airflow.podTemplate is enabled, got none: a tag may move between two verbs of one run, so Airflow refuses it; set it to sha256:…
{{- end }}
{{- if .Values.ray.enabled }}
{{- range $name := list "head" "worker" }}
{{- $resources := get (get $.Values.ray $name) "resources" }}
{{- if or (not (dig "limits" "cpu" (dig "requests" "cpu" "" $resources) $resources)) (not (dig "limits" "memory" "" $resources)) }}
ray.{{ $name }}.resources must have a cpu and a limit of memory where ray is enabled, got {{ toJson $resources }}: Ray learns from them what it may use; set them
{{- end }}
{{- end }}
{{- if and .Values.ray.autoscaling (gt (int .Values.ray.worker.minReplicas) (int .Values.ray.worker.maxReplicas)) }}
ray.worker.minReplicas must be <= maxReplicas ({{ .Values.ray.worker.maxReplicas }}), got {{ .Values.ray.worker.minReplicas }}; lower it, or raise maxReplicas
{{- end }}
{{- end }}
{{- end }}
