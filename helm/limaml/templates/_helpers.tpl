{{- define "limaml.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 40 letters leave room for what is put behind it: names of Services and of Ray's pods end at 63. */}}
{{- define "limaml.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := include "limaml.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{/* What a selector holds; never the chart's version, since selectors cannot change. Takes (list $ component). */}}
{{- define "limaml.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ include "limaml.name" $ }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of an object. Takes (list $ component) and, third, a map of additional ones. */}}
{{- define "limaml.labels" -}}
{{- $ := index . 0 -}}
{{- $labels := dict
      "app.kubernetes.io/name" (include "limaml.name" $)
      "app.kubernetes.io/instance" $.Release.Name
      "app.kubernetes.io/component" (index . 1)
      "app.kubernetes.io/version" $.Chart.AppVersion
      "app.kubernetes.io/part-of" "limaml"
      "app.kubernetes.io/managed-by" $.Release.Service
      "helm.sh/chart" (printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_") }}
{{- $more := dict }}
{{- if gt (len .) 2 }}{{ $more = index . 2 }}{{ end }}
{{- toYaml (mergeOverwrite $labels (deepCopy $.Values.commonLabels) (deepCopy $more)) }}
{{- end }}

{{/* Of pods that only ask: verbs, hooks, the test. Not the component, which Airflow's runner of verbs sets to the verb. */}}
{{- define "limaml.client" -}}
limaml/role: client
{{- end }}

{{/* Labels of a pod. The chart's version is none: it would replace pods that are the same. Takes the same list. */}}
{{- define "limaml.podLabels" -}}
{{- $ := index . 0 -}}
{{- $more := dict }}
{{- if gt (len .) 2 }}{{ $more = index . 2 }}{{ end }}
{{- toYaml (mergeOverwrite (deepCopy $.Values.commonLabels) (deepCopy $more) (fromYaml (include "limaml.selector" (list $ (index . 1))))
      (dict "app.kubernetes.io/version" $.Chart.AppVersion)) }}
{{- end }}

{{/* repository:tag@digest. Takes (list $ image). */}}
{{- define "limaml.image" -}}
{{- $image := index . 1 -}}
{{ $image.repository }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}{{ with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "limaml.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "limaml.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "limaml.externalSecret" -}}
{{ include "limaml.fullname" . }}-external
{{- end }}

{{/* The configuration as data, JSON. */}}
{{- define "limaml.config" -}}
{{ fromToml .Values.config | toJson }}
{{- end }}

{{/* The configuration's [serving], with the defaults of limaml/config/services.py where the chart needs them, JSON. */}}
{{- define "limaml.serving" -}}
{{- $config := fromJson (include "limaml.config" .) }}
{{- merge (dict) (default (dict) (get $config "serving"))
      (dict "host" "127.0.0.1" "port" 3000 "workers" 1 "timeout_s" 5 "max_in_flight" 64 "token_file" "" "allow_remote_without_token" false)
      | toJson }}
{{- end }}

{{/* Environment variables of every pod. */}}
{{- define "limaml.env" -}}
- name: TZ
  value: UTC
- name: LIMAML_CONFIG
  value: /etc/limaml/limaml.toml
- name: HOME
  value: /tmp
{{- range $name, $from := default (dict) .Values.secrets.env }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $from.name | default (include "limaml.externalSecret" $) }}
      key: {{ $from.key }}
{{- end }}
{{- end }}

{{/* What every pod says of itself. */}}
{{- define "limaml.podSecurity" -}}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- end }}

{{/* KubeRay cuts longer names. */}}
{{- define "limaml.ray" -}}
{{ include "limaml.fullname" . }}-ray
{{- end }}

{{/* Pods that may serve at once, at most. */}}
{{- define "limaml.maxReplicas" -}}
{{- $most := int .Values.serving.replicas }}
{{- if .Values.autoscaling.hpa.enabled }}{{ $most = int .Values.autoscaling.hpa.maxReplicas }}{{ end }}
{{- if .Values.autoscaling.keda.enabled }}{{ $most = int .Values.autoscaling.keda.maxReplicas }}{{ end }}
{{- $most }}
{{- end }}

{{/* And at least. */}}
{{- define "limaml.minReplicas" -}}
{{- $least := int .Values.serving.replicas }}
{{- if .Values.autoscaling.hpa.enabled }}{{ $least = int .Values.autoscaling.hpa.minReplicas }}{{ end }}
{{- if .Values.autoscaling.keda.enabled }}{{ $least = int .Values.autoscaling.keda.minReplicas }}{{ end }}
{{- $least }}
{{- end }}
