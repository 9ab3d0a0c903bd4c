{{/* A container of the image of verbs. Takes (list $ name args resources extraEnv extraVolumeMounts). */}}
{{- define "limaml.verbContainer" -}}
{{- $ := index . 0 -}}
name: {{ index . 1 }}
image: {{ include "limaml.image" (list $ $.Values.images.train) }}
imagePullPolicy: {{ $.Values.images.train.pullPolicy }}
{{- with index . 2 }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- toYaml $.Values.securityContext | nindent 2 }}
env:
  {{- include "limaml.env" $ | nindent 2 }}
  {{- with index . 4 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with index . 3 }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: config
    mountPath: /etc/limaml
    readOnly: true
  - name: tmp
    mountPath: /tmp
  - name: work
    mountPath: /var/lib/limaml
  {{- with index . 5 }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Its volumes. Takes (list $ configMap sizeLimit extraVolumes). */}}
{{- define "limaml.verbVolumes" -}}
- name: config
  configMap:
    name: {{ index . 1 }}
- name: tmp
  emptyDir:
    sizeLimit: {{ index . 2 }}
- name: work
  emptyDir:
    sizeLimit: {{ index . 2 }}
{{- with index . 3 }}
{{ toYaml . }}
{{- end }}
{{- end }}
