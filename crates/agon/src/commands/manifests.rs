//! `agon manifests`: what a cluster needs to run a configuration.

use std::process::ExitCode;

use serde_json::{Value, json};
use settings::{Settings, TransportSettings};

use super::configuration::Configuration;
use crate::failure::Misuse;

/// Where every process shows its metrics.
const METRICS_PORT: i32 = 9464;

/// How long a learner may take to save when its machine is taken away, in seconds.
const GRACE: i64 = 300;

/// Print Kubernetes manifests, or systemd units, for a run over JetStream.
///
/// Kubernetes: a ConfigMap with the configuration, a volume for the run directory, the learner as a Job that
/// resumes when it is restarted, actors and preference services as Deployments (topology.actors and
/// topology.preference of them; scale them as you like). A NATS server with JetStream must be there already:
/// transport.url says where.
///
/// Example: agon manifests configs/cluster.toml --image registry.example.com/agon:0.1.0 | kubectl apply -f -
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    configuration: Configuration,
    /// The container image with the agon program.
    #[arg(long, default_value = "agon:latest")]
    image: String,
    /// The size of the volume for the run directory.
    #[arg(long, default_value = "50Gi")]
    storage: String,
    /// Units for systemd instead.
    #[arg(long)]
    systemd: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    match &settings.transport {
        TransportSettings::Jetstream(jetstream) if !jetstream.url.is_empty() => {}
        _ => {
            return Err(Misuse(
                "processes on several machines need a server: set transport.kind = \"jetstream\" and \
                 transport.url"
                    .into(),
            )
            .into());
        }
    }
    if arguments.systemd {
        out!("{}", units(settings).trim_end())?;
    } else {
        let cluster = Cluster {
            arguments,
            settings,
            toml: resolved.toml.clone(),
            name: format!(
                "agon-{}",
                settings.run.name.to_lowercase().replace('_', "-")
            ),
        };
        out!("{:#}", cluster.list())?;
    }
    Ok(ExitCode::SUCCESS)
}

struct Cluster<'a> {
    arguments: &'a Arguments,
    settings: &'a Settings,
    toml: String,
    name: String,
}

impl Cluster<'_> {
    /// The `List` of all resources, as `kubectl apply -f -` takes it.
    fn list(&self) -> Value {
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

    fn metadata(&self, part: &str) -> Value {
        json!({"name": format!("{}-{part}", self.name), "labels": self.labels(part)})
    }

    fn labels(&self, part: &str) -> Value {
        json!({
            "app.kubernetes.io/name": "agon",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": part,
        })
    }

    fn config(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": self.metadata("config"),
            "data": {"config.toml": self.toml},
        })
    }

    fn volume(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": self.metadata("run"),
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": self.arguments.storage}},
            },
        })
    }

    /// The learner ends when the run does, and is started again, to resume, when it fails before.
    fn learner(&self) -> Value {
        let extra = ["--run-dir", "/run-dir/run", "--resume=auto"];
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.metadata("learner"),
            "spec": {"backoffLimit": 1000, "template": self.pod("learner", &extra, "OnFailure")},
        })
    }

    fn deployment(&self, part: &str, replicas: usize) -> Value {
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": self.metadata(part),
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": self.labels(part)},
                "template": self.pod(part, &[], "Always"),
            },
        })
    }

    fn pod(&self, part: &str, extra: &[&str], restart: &str) -> Value {
        json!({
            "metadata": {
                "labels": self.labels(part),
                "annotations": {
                    "prometheus.io/scrape": "true",
                    "prometheus.io/port": METRICS_PORT.to_string(),
                },
            },
            "spec": {
                "containers": [self.container(part, extra)],
                "restartPolicy": restart,
                "terminationGracePeriodSeconds": GRACE,
                "volumes": self.volumes(part),
            },
        })
    }

    fn container(&self, part: &str, extra: &[&str]) -> Value {
        let listen = format!("telemetry.listen=0.0.0.0:{METRICS_PORT}");
        let command = [part, "/etc/agon/config.toml", "--set", &listen];
        let args = [&command[..], extra].concat();
        let mut mounts = vec![json!({"name": "config", "mountPath": "/etc/agon"})];
        if part == "learner" {
            mounts.push(json!({"name": "run", "mountPath": "/run-dir"}));
        }
        json!({
            "name": part,
            "image": self.arguments.image,
            "args": args,
            "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
            "livenessProbe": {
                "httpGet": {"path": "/metrics", "port": METRICS_PORT},
                "initialDelaySeconds": 30,
                "periodSeconds": 30,
                "failureThreshold": 5,
            },
            "volumeMounts": mounts,
        })
    }

    fn volumes(&self, part: &str) -> Value {
        let config = json!({
            "name": "config",
            "configMap": {"name": format!("{}-config", self.name)},
        });
        if part != "learner" {
            return json!([config]);
        }
        let claim = format!("{}-run", self.name);
        json!([config, {"name": "run", "persistentVolumeClaim": {"claimName": claim}}])
    }
}

/// A unit for each role, one after the other, each after a line that names its file.
fn units(settings: &Settings) -> String {
    let name = &settings.run.name;
    let unit = |file: &str, role: &str, extra: &str, restart: &str| {
        format!(
            "# {file}\n[Unit]\nDescription=Agon {role} of the run {name}\nAfter=network-online.target\n\
             Wants=network-online.target\n\n[Service]\n\
             ExecStart=/usr/local/bin/agon {role} /etc/agon/{name}.toml{extra}\n\
             WorkingDirectory=/var/lib/agon\nRestart={restart}\nRestartSec=5\n\
             RestartPreventExitStatus=2 3 4\nTimeoutStopSec={GRACE}\n\n\
             [Install]\nWantedBy=multi-user.target\n\n"
        )
    };
    [
        unit(
            &format!("agon-{name}-learner.service"),
            "learner",
            &format!(" --run-dir /var/lib/agon/{name} --resume=auto"),
            "on-failure",
        ),
        unit(
            &format!("agon-{name}-actor@.service"),
            "actor",
            "",
            "always",
        ),
        unit(
            &format!("agon-{name}-preference@.service"),
            "preference",
            "",
            "always",
        ),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use settings::resolve;

    use super::*;

    fn list() -> Value {
        let text = "[run]\nname = \"my_run\"\n[transport]\nkind = \"jetstream\"\n\
                    url = \"nats://nats:4222\"\n[topology]\nactors = 7\npreference = 2\n";
        let resolved = resolve(text, "test", &[]).expect("they are sound");
        let arguments = Arguments {
            configuration: Configuration {
                config: "a.toml".into(),
                set: Vec::new(),
            },
            image: "agon:test".into(),
            storage: "9Gi".into(),
            systemd: false,
        };
        let cluster = Cluster {
            arguments: &arguments,
            settings: &resolved.settings,
            toml: resolved.toml,
            name: "agon-my-run".into(),
        };
        cluster.list()
    }

    #[test]
    fn the_parts_of_a_cluster_fit_one_another() {
        let list = list();
        let items = list["items"].as_array().expect("a list");
        let of = |kind: &str, name: &str| {
            let found = items.iter().find(|item| {
                item["kind"] == kind && item["metadata"]["name"] == format!("agon-my-run-{name}")
            });
            found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
        };
        let config = of("ConfigMap", "config");
        let text = config["data"]["config.toml"].as_str().expect("text");
        assert!(resolve(text, "the config map", &[]).is_ok());
        assert_eq!(of("Deployment", "actor")["spec"]["replicas"], 7);
        assert_eq!(of("Deployment", "preference")["spec"]["replicas"], 2);
        let claim = of("PersistentVolumeClaim", "run");
        assert_eq!(claim["spec"]["resources"]["requests"]["storage"], "9Gi");
        let learner = of("Job", "learner")["spec"]["template"]["spec"].clone();
        assert_eq!(learner["restartPolicy"], "OnFailure");
        let volumes = learner["volumes"].as_array().expect("a list");
        assert_eq!(
            volumes[1]["persistentVolumeClaim"]["claimName"],
            "agon-my-run-run"
        );
        let words = learner["containers"][0]["args"].as_array().expect("a list");
        assert!(words.contains(&json!("--resume=auto")), "{words:?}");
    }

    #[test]
    fn units_name_the_run_and_do_not_restart_what_cannot_work() {
        let resolved = resolve("[run]\nname = \"x\"\n", "test", &[]).expect("they are sound");
        let units = units(&resolved.settings);
        assert_eq!(units.matches("[Service]").count(), 3);
        assert_eq!(units.matches("RestartPreventExitStatus=2 3 4").count(), 3);
        assert!(
            units.contains("agon learner /etc/agon/x.toml --run-dir /var/lib/agon/x --resume=auto")
        );
    }
}
