{{- /* The Deployment of a role: .root, .component, .args (flags of this role alone), .ports and .volumes (Secrets beside those of both roles). */ -}}
{{- define "midspan.deployment" -}}
{{- $values := get .root.Values .component -}}
{{- $name := printf "%s-%s" (include "midspan.name" .root) .component -}}
{{- $redis := .root.Values.redis -}}
{{- $redisSecret := include "midspan.redisSecret" .root -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "midspan.labels" . | nindent 4 }}
spec:
  {{- if not $values.autoscaling.enabled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  selector:
    matchLabels:
      {{- include "midspan.selector" . | nindent 6 }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      # An old pod goes when a new one is ready, and is served until it has drained.
      maxSurge: 25%
      maxUnavailable: 0
  template:
    metadata:
      labels:
        {{- include "midspan.selector" . | nindent 8 }}
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: {{ .token }}
      # Their variables would look like settings.
      enableServiceLinks: false
      # Delay and grace of the drain, and at most 40 s until the last streams are told and the log is written.
      terminationGracePeriodSeconds: {{ add $values.drain.delaySeconds $values.drain.graceSeconds 40 }}
      {{- include "midspan.pullSecrets" .root | nindent 6 }}
      securityContext:
        {{- include "midspan.podSecurity" .root | nindent 8 }}
      {{- with $values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
        - topologyKey: {{ $key }}
          maxSkew: 1
          whenUnsatisfiable: ScheduleAnyway
          nodeTaintsPolicy: Honor
          labelSelector:
            matchLabels:
              {{- include "midspan.selector" $ | nindent 14 }}
          matchLabelKeys: [pod-template-hash]
        {{- end }}
      containers:
        - name: {{ .component }}
          image: {{ include "midspan.image" .root }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          command: [/usr/local/bin/midspand]
          args:
            - {{ .component }}
            {{- range .args }}
            - {{ . | quote }}
            {{- end }}
            - "--listen={{ include "midspan.any" .root }}:{{ .ports.public }}"
            - "--internal-listen={{ include "midspan.any" .root }}:{{ .ports.internal }}"
            - "--internal-address={{ include "midspan.podIp" .root }}:{{ .ports.internal }}"
            - --internal-ca=/etc/midspan/internal/ca.crt
            - --internal-certificate=/etc/midspan/internal/tls.crt
            - --internal-key=/etc/midspan/internal/tls.key
            - "--admin-listen={{ include "midspan.any" .root }}:{{ .ports.admin }}"
            - --ticket-key-file=/etc/midspan/ticket/ticket.key
            {{- if .root.Values.tls.enabled }}
            - --tls-certificate=/etc/midspan/tls/tls.crt
            - --tls-key=/etc/midspan/tls/tls.key
            {{- else }}
            - --insecure-plaintext
            {{- end }}
            {{- if .root.Values.denyList.existingSecret }}
            - --deny-file=/etc/midspan/deny/deny.json
            {{- end }}
            - {{ printf "--redis-url=%s" (include "midspan.redisUrl" .root) | quote }}
            - {{ printf "--redis-prefix=%s" $redis.prefix | quote }}
            {{- if $redis.cluster }}
            - --redis-cluster
            {{- end }}
            {{- with $redis.sentinelMaster }}
            - {{ printf "--redis-sentinel-master=%s" . | quote }}
            {{- end }}
            {{- with $redis.username }}
            - {{ printf "--redis-username=%s" . | quote }}
            {{- end }}
            {{- if and $redisSecret $redis.passwordKey }}
            - {{ printf "--redis-password-file=/etc/midspan/redis/%s" $redis.passwordKey | quote }}
            {{- end }}
            {{- with $redis.sentinelPasswordKey }}
            - {{ printf "--redis-sentinel-password-file=/etc/midspan/redis/%s" . | quote }}
            {{- end }}
            {{- with $redis.caKey }}
            - {{ printf "--redis-ca-file=/etc/midspan/redis/%s" . | quote }}
            {{- end }}
            {{- with .root.Values.clientAddress }}
            {{- with .proxyProtocolFrom }}
            - {{ printf "--proxy-protocol-from=%s" (join "," .) | quote }}
            {{- end }}
            {{- if .forwardedFrom }}
            - {{ printf "--forwarded-from=%s" (join "," .forwardedFrom) | quote }}
            - --forwarded-header={{ .forwardedHeader }}
            {{- end }}
            {{- end }}
            - --drain-delay={{ $values.drain.delaySeconds }}s
            - --drain-grace={{ $values.drain.graceSeconds }}s
            - {{ printf "--log-level=%s" .root.Values.logs.level | quote }}
            - {{ printf "--log-format=%s" .root.Values.logs.format | quote }}
            {{- range $values.extraArgs }}
            - {{ . | quote }}
            {{- end }}
          env:
            - name: POD_NAME
              valueFrom: {fieldRef: {fieldPath: metadata.name}}
            - name: POD_IP
              valueFrom: {fieldRef: {fieldPath: status.podIP}}
          ports:
            {{- range $port, $number := .ports }}
            - name: {{ $port }}
              containerPort: {{ $number }}
              protocol: TCP
            {{- end }}
          livenessProbe:
            httpGet: {path: /livez, port: admin}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            httpGet: {path: /readyz, port: admin}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: 2
          resources:
            {{- toYaml $values.resources | nindent 12 }}
          securityContext:
            {{- include "midspan.containerSecurity" . | nindent 12 }}
          volumeMounts:
            {{- range $volume, $_ := .volumes }}
            - name: {{ $volume }}
              mountPath: /etc/midspan/{{ $volume }}
              readOnly: true
            {{- end }}
      volumes:
        {{- range $volume, $source := .volumes }}
        - name: {{ $volume }}
          secret:
            secretName: {{ $source.secret }}
            defaultMode: 0440
            {{- with $source.items }}
            items:
              {{- range . }}
              - {key: {{ . }}, path: {{ . }}}
              {{- end }}
            {{- end }}
        {{- end }}
{{- end -}}

{{- /* The Secrets that both roles read, as JSON: where, and which of their keys. */ -}}
{{- define "midspan.volumes" -}}
{{- $keys := printf "%s-keys" (include "midspan.name" .root) -}}
{{- $volumes := dict
  "ticket" (dict "secret" (.root.Values.ticketKey.existingSecret | default $keys) "items" (list "ticket.key"))
  "internal" (dict "secret" (include "midspan.internalSecret" .) "items" (list "ca.crt" "tls.crt" "tls.key")) -}}
{{- if .root.Values.tls.enabled -}}
{{- $_ := set $volumes "tls" (dict "secret" (include "midspan.tlsSecret" .root) "items" (list "tls.crt" "tls.key")) -}}
{{- end -}}
{{- with .root.Values.denyList.existingSecret -}}
{{- $_ := set $volumes "deny" (dict "secret" . "items" (list "deny.json")) -}}
{{- end -}}
{{- with include "midspan.redisSecret" .root -}}
{{- $items := compact (list $.root.Values.redis.passwordKey $.root.Values.redis.sentinelPasswordKey $.root.Values.redis.caKey) -}}
{{- if $items }}{{ $_ := set $volumes "redis" (dict "secret" . "items" $items) }}{{ end -}}
{{- end -}}
{{- if eq .component "control" -}}
{{- $_ := set $volumes "credentials" (dict "secret" (.root.Values.credentials.existingSecret | default $keys) "items" (list "credentials.json")) -}}
{{- end -}}
{{- $volumes | toJson -}}
{{- end -}}

{{- define "midspan.redisUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "midspan.name" . }}-redis:6379
{{- else -}}
{{ .Values.redis.url }}
{{- end -}}
{{- end -}}

{{- /* The Secret with Redis' password, or nothing. */ -}}
{{- define "midspan.redisSecret" -}}
{{- if .Values.redis.existingSecret }}{{ .Values.redis.existingSecret }}{{ else if .Values.redis.enabled }}{{ include "midspan.name" . }}-redis{{ end -}}
{{- end -}}
