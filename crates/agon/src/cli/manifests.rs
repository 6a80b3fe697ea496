//! `agon manifests`: Kubernetes manifests or systemd units for a run over JetStream.

use std::process::ExitCode;

use serde_json::{Value, json};
use settings::{Settings, TransportSettings};

use crate::cli::config_args::Configuration;
use crate::exit_code::UsageError;

/// Port of every process's metrics.
const METRICS_PORT: i32 = 9464;

/// Time for a process to stop, in seconds; the learner saves a checkpoint.
const STOP_TIMEOUT: i64 = 300;

/// Print Kubernetes manifests, or systemd units, for a run over JetStream.
///
/// Kubernetes: a ConfigMap with the configuration, a volume for the run directory, the learner as a Job that
/// resumes when it is restarted, actors and preference services as Deployments (topology.actors and
/// topology.preference replicas; they can be scaled at any time). Requires a running NATS server with JetStream at
/// transport.url.
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
    /// Print systemd units instead.
    #[arg(long)]
    systemd: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    match &settings.transport {
        TransportSettings::Jetstream(jetstream) if !jetstream.url.is_empty() => {}
        _ => {
            return Err(UsageError(
                "a run on several machines needs a NATS server: set transport.kind = \"jetstream\" and \
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
    /// The `List` of all resources, as `kubectl apply -f -` expects it.
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

    /// The learner ends with the run; if it fails before, it is restarted and resumes.
    fn learner(&self) -> Value {
        let extra = ["--run-dir", "/run-dir/run", "--resume=auto"];
        json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": self.metadata("learner"),
            "spec": {"backoffLimit": 1000, "template": self.pod("learner", &extra, "OnFailure")},
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
        let mut mounts = vec![json!({"name": "config", "mountPath": "/etc/agon"})];
        if role == "learner" {
            mounts.push(json!({"name": "run", "mountPath": "/run-dir"}));
        }
        json!({
            "name": role,
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

    fn volumes(&self, role: &str) -> Value {
        let config = json!({
            "name": "config",
            "configMap": {"name": format!("{}-config", self.name)},
        });
        if role != "learner" {
            return json!([config]);
        }
        let claim = format!("{}-run", self.name);
        json!([config, {"name": "run", "persistentVolumeClaim": {"claimName": claim}}])
    }
}

/// The units of all roles, each after a comment with its file name.
fn units(settings: &Settings) -> String {
    let name = &settings.run.name;
    let unit = |file: &str, role: &str, extra: &str, restart: &str| {
        format!(
            "# {file}\n[Unit]\nDescription=Agon {role} of the run {name}\nAfter=network-online.target\n\
             Wants=network-online.target\n\n[Service]\n\
             ExecStart=/usr/local/bin/agon {role} /etc/agon/{name}.toml{extra}\n\
             WorkingDirectory=/var/lib/agon\nRestart={restart}\nRestartSec=5\n\
             RestartPreventExitStatus=2 3 4\nTimeoutStopSec={STOP_TIMEOUT}\n\n\
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
    use crate::cli::config_args::Overrides;

    fn list() -> Value {
        let text = "[run]\nname = \"my_run\"\n[transport]\nkind = \"jetstream\"\n\
                    url = \"nats://nats:4222\"\n[topology]\nactors = 7\npreference = 2\n";
        let resolved = resolve(text, "test", &[]).expect("they are sound");
        let arguments = Arguments {
            configuration: Configuration {
                config: "a.toml".into(),
                overrides: Overrides { set: Vec::new() },
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
    fn manifests_are_consistent() {
        let list = list();
        let items = list["items"].as_array().expect("a list");
        let find = |kind: &str, name: &str| {
            let found = items.iter().find(|item| {
                item["kind"] == kind && item["metadata"]["name"] == format!("agon-my-run-{name}")
            });
            found.unwrap_or_else(|| panic!("no {kind} {name}")).clone()
        };
        let config = find("ConfigMap", "config");
        let text = config["data"]["config.toml"].as_str().expect("text");
        assert!(resolve(text, "the config map", &[]).is_ok());
        assert_eq!(find("Deployment", "actor")["spec"]["replicas"], 7);
        assert_eq!(find("Deployment", "preference")["spec"]["replicas"], 2);
        let claim = find("PersistentVolumeClaim", "run");
        assert_eq!(claim["spec"]["resources"]["requests"]["storage"], "9Gi");
        let learner = find("Job", "learner")["spec"]["template"]["spec"].clone();
        assert_eq!(learner["restartPolicy"], "OnFailure");
        let volumes = learner["volumes"].as_array().expect("a list");
        assert_eq!(
            volumes[1]["persistentVolumeClaim"]["claimName"],
            "agon-my-run-run"
        );
        let args = learner["containers"][0]["args"].as_array().expect("a list");
        assert!(args.contains(&json!("--resume=auto")), "{args:?}");
    }

    #[test]
    fn units_do_not_restart_after_configuration_errors() {
        let resolved = resolve("[run]\nname = \"x\"\n", "test", &[]).expect("they are sound");
        let units = units(&resolved.settings);
        assert_eq!(units.matches("[Service]").count(), 3);
        assert_eq!(units.matches("RestartPreventExitStatus=2 3 4").count(), 3);
        assert!(
            units.contains("agon learner /etc/agon/x.toml --run-dir /var/lib/agon/x --resume=auto")
        );
    }
}
