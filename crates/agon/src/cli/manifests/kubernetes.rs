//! Kubernetes manifests of a run.

use serde_json::{Value, json};
use settings::Settings;
use telemetry::printable;

use super::{
    FINAL_CODES, INTERRUPTED_CODE, METRICS_PORT, STOP_TIMEOUT,
    instance_name::instance_name,
    secret_files::{MOUNT, MountedConfiguration},
};

/// User and group of the containers; `nonroot` of distroless images.
const USER: u32 = 65532;

/// Folder of the run directory in the learner's container.
const RUN_DIR: &str = "/run-dir";

/// Working directory of the other containers.
const WORK_DIR: &str = "/work";

const ROLES: [&str; 3] = ["learner", "actor", "preference"];

/// Container image and resource requests.
#[derive(Debug, Clone, Copy)]
pub(super) struct ContainerResources<'a> {
    /// Image with the program.
    pub(super) image: &'a str,
    /// Size of the run directory's volume and limit on temporary files.
    pub(super) storage: &'a str,
    /// Requested processors.
    pub(super) cpu: &'a str,
    /// Requested memory and its limit.
    pub(super) memory: &'a str,
}

/// The resources of a run.
pub(super) struct Cluster<'a> {
    settings: &'a Settings,
    configuration: MountedConfiguration,
    resources: ContainerResources<'a>,
    /// Prefix of all names.
    name: String,
}

impl<'a> Cluster<'a> {
    /// The resources of a run with these settings, whose text is `toml`.
    ///
    /// # Errors
    /// When the text is not TOML.
    pub(super) fn new(
        settings: &'a Settings,
        toml: &str,
        resources: ContainerResources<'a>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            settings,
            configuration: MountedConfiguration::new(toml)?,
            resources,
            name: instance_name(&settings.run.name),
        })
    }

    /// The `List` of all resources, as `kubectl apply -f -` expects it.
    pub(super) fn list(&self) -> Value {
        let topology = &self.settings.topology;
        json!({
            "apiVersion": "v1",
            "kind": "List",
            "items": [
                self.config(),
                self.volume(),
                self.learner(),
                self.deployment("actor", topology.actors),
                self.deployment("preference", topology.preference),
            ],
        })
    }

    /// Shell commands that create the Secrets, with comments on the files that they need.
    pub(super) fn secret_commands(&self) -> Vec<String> {
        let intro = "# Secrets are not printed. Put the files of each role in a folder, which becomes its Secret:";
        let mut lines = vec![intro.to_owned()];
        for role in ROLES {
            let files: Vec<String> = self
                .secrets(role)
                .map(|[name, local]| match local {
                    "" => format!("{name} (a token of your choice)"),
                    _ => format!("{name} (here: {})", printable(local)),
                })
                .collect();
            lines.push(format!("# secrets/{role}: {}", files.join(", ")));
            let secret = self.secret_name(role);
            lines.push(format!(
                "kubectl create secret generic {secret} --from-file=secrets/{role}"
            ));
        }
        lines
    }

    /// Name and local path of every file with a secret that a role reads.
    fn secrets(&self, role: &str) -> impl Iterator<Item = [&str; 2]> {
        let files = self.configuration.files.iter();
        let files = files.filter(move |file| file.is_read_by(role));
        files.map(|file| [file.name.as_str(), file.local.as_str()])
    }

    fn secret_name(&self, role: &str) -> String {
        format!("{}-{role}-secrets", self.name)
    }

    fn metadata(&self, role: &str) -> Value {
        json!({"name": format!("{}-{role}", self.name), "labels": self.labels(role)})
    }

    fn labels(&self, role: &str) -> Value {
        json!({
            "app.kubernetes.io/name": "agon",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": role,
        })
    }

    fn config(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self.metadata("config"),
            "data": {"config.toml": self.configuration.toml},
        })
    }

    fn volume(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": self.metadata("run"),
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": self.resources.storage}},
            },
        })
    }

    /// The learner ends with the run. If it fails before, another pod resumes, unless the failure is final; one that
    /// was told to stop, as when its node is drained, does not count as failed.
    fn learner(&self) -> Value {
        let extra = ["--run-dir", &format!("{RUN_DIR}/run"), "--resume=auto"];
        let on_codes = |action: &str, codes: &[u8]| {
            json!({
                "action": action,
                "onExitCodes": {"containerName": "learner", "operator": "In", "values": codes},
            })
        };
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.metadata("learner"),
            "spec": {
                "backoffLimit": 1000,
                "podFailurePolicy": {"rules": [
                    on_codes("FailJob", &FINAL_CODES),
                    on_codes("Ignore", &[INTERRUPTED_CODE]),
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
                ]},
                "template": self.pod("learner", &extra, "Never"),
            },
        })
    }

    fn deployment(&self, role: &str, replicas: usize) -> Value {
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.metadata(role),
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": self.labels(role)},
                "template": self.pod(role, &[], "Always"),
            },
        })
    }

    fn pod(&self, role: &str, extra: &[&str], restart: &str) -> Value {
        json!({
            "metadata": {
                "labels": self.labels(role),
                "annotations": {
                    "prometheus.io/scrape": "true",
                    "prometheus.io/port": METRICS_PORT.to_string(),
                },
            },
            "spec": {
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "securityContext": {
                    "runAsNonRoot": true,
                    "runAsUser": USER,
                    "runAsGroup": USER,
                    "fsGroup": USER,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [self.container(role, extra)],
                "restartPolicy": restart,
                "terminationGracePeriodSeconds": STOP_TIMEOUT,
                "volumes": self.volumes(role),
            },
        })
    }

    fn container(&self, role: &str, extra: &[&str]) -> Value {
        let listen = format!("telemetry.listen=0.0.0.0:{METRICS_PORT}");
        let command = [role, "/etc/agon/config.toml", "--set", &listen];
        let args = [&command[..], extra].concat();
        let work = if role == "learner" { RUN_DIR } else { WORK_DIR };
        let work_volume = if role == "learner" { "run" } else { "work" };
        json!({
            "name": role,
            "image": self.resources.image,
            "args": args,
            "workingDir": work,
            "env": [{"name": "HF_HOME", "value": format!("{work}/huggingface")}],
            "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
            "resources": self.compute(),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"]},
            },
            "livenessProbe": {
                "httpGet": {"path": "/healthz", "port": METRICS_PORT},
                "initialDelaySeconds": 30,
                "periodSeconds": 30,
                "failureThreshold": 5,
            },
            "volumeMounts": [
                {"name": "config", "mountPath": "/etc/agon", "readOnly": true},
                {"name": "secrets", "mountPath": MOUNT, "readOnly": true},
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": work_volume, "mountPath": work},
            ],
        })
    }

    fn compute(&self) -> Value {
        let ContainerResources { cpu, memory, .. } = self.resources;
        let mut limits = json!({"memory": memory});
        if self.settings.model.device.starts_with("cuda") {
            limits["nvidia.com/gpu"] = "1".into();
        }
        json!({"requests": {"cpu": cpu, "memory": memory}, "limits": limits})
    }

    fn volumes(&self, role: &str) -> Value {
        let temporary =
            |name: &str| json!({"name": name, "emptyDir": {"sizeLimit": self.resources.storage}});
        let work = match role {
            "learner" => {
                let claim = format!("{}-run", self.name);
                json!({"name": "run", "persistentVolumeClaim": {"claimName": claim}})
            }
            _ => temporary("work"),
        };
        json!([
            {"name": "config", "configMap": {"name": format!("{}-config", self.name)}},
            // Readable by the group, which is fsGroup.
            {"name": "secrets", "secret": {"secretName": self.secret_name(role), "defaultMode": 0o440}},
            temporary("tmp"),
            work,
        ])
    }
}

#[cfg(test)]
mod tests {
    use settings::{Override, Resolved, resolve};

    use super::*;

    const TEXT: &str = "[run]\nname = \"my-run\"\n[transport]\nkind = \"jetstream\"\nurl = \"nats://nats:4222\"\n\
                        credentials_path = \"mine.creds\"\n[topology]\nactors = 7\npreference = 2\n";

    fn resolved(text: &str) -> Resolved {
        resolve(text, "test", &[]).expect("they are valid")
    }

    fn list(text: &str) -> Vec<Value> {
        let resolved = resolved(text);
        let resources = ContainerResources {
            image: "agon:test",
            storage: "9Gi",
            cpu: "2",
            memory: "3Gi",
        };
        let cluster = Cluster::new(&resolved.settings, &resolved.toml, resources).expect("valid");
        let list = cluster.list();
        list["items"].as_array().expect("a list").clone()
    }

    #[track_caller]
    fn find<'a>(items: &'a [Value], kind: &str, role: &str) -> &'a Value {
        let mut items = items.iter();
        let name = format!("agon-my-run-{role}");
        let found = items.find(|item| item["kind"] == kind && item["metadata"]["name"] == *name);
        found.unwrap_or_else(|| panic!("no {kind} {name}"))
    }

    /// The pods of all roles.
    fn pods(items: &[Value]) -> [&Value; 3] {
        let pod = |kind, role| &find(items, kind, role)["spec"]["template"]["spec"];
        [
            pod("Job", "learner"),
            pod("Deployment", "actor"),
            pod("Deployment", "preference"),
        ]
    }

    #[test]
    fn manifests_are_consistent() {
        let items = list(TEXT);
        assert_eq!(find(&items, "Deployment", "actor")["spec"]["replicas"], 7);
        assert_eq!(
            find(&items, "Deployment", "preference")["spec"]["replicas"],
            2
        );
        let claim = find(&items, "PersistentVolumeClaim", "run");
        assert_eq!(claim["spec"]["resources"]["requests"]["storage"], "9Gi");
        let job = &find(&items, "Job", "learner")["spec"];
        // Kubernetes rejects a policy for pods that are restarted in place.
        assert_eq!(job["template"]["spec"]["restartPolicy"], "Never");
        assert_eq!(
            job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"],
            json!([2, 4])
        );
        for pod in pods(&items) {
            let container = &pod["containers"][0];
            let volumes = pod["volumes"].as_array().expect("a list");
            for mount in container["volumeMounts"].as_array().expect("a list") {
                let named = volumes
                    .iter()
                    .filter(|volume| volume["name"] == mount["name"]);
                assert_eq!(named.count(), 1, "{mount}");
            }
            assert_eq!(
                volumes.len(),
                container["volumeMounts"].as_array().expect("a list").len()
            );
        }
        let args = &job["template"]["spec"]["containers"][0]["args"];
        assert!(
            args.as_array()
                .expect("a list")
                .contains(&json!("--resume=auto")),
            "{args}"
        );
    }

    #[test]
    fn containers_are_started_with_a_valid_configuration() {
        let items = list(TEXT);
        let config = &find(&items, "ConfigMap", "config")["data"]["config.toml"];
        let config = config.as_str().expect("text");
        for pod in pods(&items) {
            let args = pod["containers"][0]["args"].as_array().expect("a list");
            let args: Vec<&str> = args.iter().map(|arg| arg.as_str().expect("text")).collect();
            assert_eq!(args[1..3], ["/etc/agon/config.toml", "--set"]);
            let set: Override = args[3].parse().expect("an override");
            let resolved = resolve(config, "the config map", &[set]);
            resolved.unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn containers_run_without_privileges_and_within_bounds() {
        for pod in pods(&list(TEXT)) {
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
            assert_eq!(pod["automountServiceAccountToken"], false);
            let container = &pod["containers"][0];
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
            assert_eq!(
                container["securityContext"]["allowPrivilegeEscalation"],
                false
            );
            assert_eq!(
                container["securityContext"]["capabilities"]["drop"],
                json!(["ALL"])
            );
            assert_eq!(container["resources"]["limits"], json!({"memory": "3Gi"}));
        }
        let cuda = format!("{TEXT}[model]\ndevice = \"cuda:0\"\n");
        for pod in pods(&list(&cuda)) {
            assert_eq!(
                pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"],
                "1"
            );
        }
    }

    #[test]
    fn secrets_are_mounted_and_never_printed() {
        let items = list(TEXT);
        let text = Value::from(items.clone()).to_string();
        assert!(!text.contains("mine.creds"), "{text}");
        for (pod, role) in pods(&items).into_iter().zip(ROLES) {
            let secret = &pod["volumes"][1]["secret"];
            assert_eq!(secret["secretName"], format!("agon-my-run-{role}-secrets"));
            assert_eq!(secret["defaultMode"], 0o440);
        }
        let resolved = resolved(TEXT);
        let resources = ContainerResources {
            image: "i",
            storage: "1",
            cpu: "1",
            memory: "1",
        };
        let cluster = Cluster::new(&resolved.settings, &resolved.toml, resources).expect("valid");
        let commands = cluster.secret_commands().join("\n");
        let expected =
            "kubectl create secret generic agon-my-run-actor-secrets --from-file=secrets/actor";
        assert!(commands.contains(expected), "{commands}");
        assert!(
            commands.contains("transport.credentials (here: mine.creds)"),
            "{commands}"
        );
    }

    #[test]
    fn names_of_every_run_are_valid() {
        for run in ["My_Run", "-", &"x".repeat(100)] {
            let text = TEXT.replace("my-run", run);
            for item in list(&text) {
                let name = item["metadata"]["name"]
                    .as_str()
                    .expect("a name")
                    .to_owned();
                let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                assert!(
                    name.len() <= 46 && name.chars().all(is_allowed),
                    "{run:?}: {name}"
                );
                let instance = &item["metadata"]["labels"]["app.kubernetes.io/instance"];
                assert!(
                    instance.as_str().is_some_and(|label| label.len() < 63),
                    "{instance}"
                );
            }
        }
    }
}
