//! `agon manifests`: what a cluster needs to run a configuration.

use std::{collections::BTreeMap, process::ExitCode};

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec},
        batch::v1::{Job, JobSpec},
        core::v1::{
            ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, HTTPGetAction,
            PersistentVolumeClaim, PersistentVolumeClaimSpec, PersistentVolumeClaimVolumeSource,
            PodSpec, PodTemplateSpec, Probe, Volume, VolumeMount, VolumeResourceRequirements,
        },
    },
    apimachinery::pkg::{
        api::resource::Quantity, apis::meta::v1::LabelSelector, apis::meta::v1::ObjectMeta,
        util::intstr::IntOrString,
    },
};
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
        print!("{}", units(settings));
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
        println!("{:#}", cluster.list()?);
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
    fn list(&self) -> anyhow::Result<Value> {
        let topology = &self.settings.topology;
        let items = [
            serde_json::to_value(self.config())?,
            serde_json::to_value(self.volume())?,
            serde_json::to_value(self.learner())?,
            serde_json::to_value(self.deployment("actor", topology.actors))?,
            serde_json::to_value(self.deployment("preference", topology.preference))?,
        ];
        Ok(json!({"apiVersion": "v1", "kind": "List", "items": items}))
    }

    fn metadata(&self, part: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(format!("{}-{part}", self.name)),
            labels: Some(self.labels(part)),
            ..ObjectMeta::default()
        }
    }

    fn labels(&self, part: &str) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("app.kubernetes.io/name".into(), "agon".into()),
            ("app.kubernetes.io/instance".into(), self.name.clone()),
            ("app.kubernetes.io/component".into(), part.into()),
        ])
    }

    fn config(&self) -> ConfigMap {
        ConfigMap {
            metadata: self.metadata("config"),
            data: Some(BTreeMap::from([("config.toml".into(), self.toml.clone())])),
            ..ConfigMap::default()
        }
    }

    fn volume(&self) -> PersistentVolumeClaim {
        let size = Quantity(self.arguments.storage.clone());
        PersistentVolumeClaim {
            metadata: self.metadata("run"),
            spec: Some(PersistentVolumeClaimSpec {
                access_modes: Some(vec!["ReadWriteOnce".into()]),
                resources: Some(VolumeResourceRequirements {
                    requests: Some(BTreeMap::from([("storage".into(), size)])),
                    ..VolumeResourceRequirements::default()
                }),
                ..PersistentVolumeClaimSpec::default()
            }),
            ..PersistentVolumeClaim::default()
        }
    }

    /// The learner ends when the run does, and is started again, to resume, when it fails before.
    fn learner(&self) -> Job {
        let extra = ["--run-dir", "/run-dir/run", "--resume=auto"];
        Job {
            metadata: self.metadata("learner"),
            spec: Some(JobSpec {
                backoff_limit: Some(1000),
                template: self.pod("learner", &extra, "OnFailure"),
                ..JobSpec::default()
            }),
            ..Job::default()
        }
    }

    fn deployment(&self, part: &str, replicas: usize) -> Deployment {
        Deployment {
            metadata: self.metadata(part),
            spec: Some(DeploymentSpec {
                replicas: Some(i32::try_from(replicas).unwrap_or(i32::MAX)),
                selector: LabelSelector {
                    match_labels: Some(self.labels(part)),
                    ..LabelSelector::default()
                },
                template: self.pod(part, &[], "Always"),
                ..DeploymentSpec::default()
            }),
            ..Deployment::default()
        }
    }

    fn pod(&self, part: &str, extra: &[&str], restart: &str) -> PodTemplateSpec {
        let scraped = BTreeMap::from([
            ("prometheus.io/scrape".into(), "true".into()),
            ("prometheus.io/port".into(), METRICS_PORT.to_string()),
        ]);
        let metadata = ObjectMeta {
            labels: Some(self.labels(part)),
            annotations: Some(scraped),
            ..ObjectMeta::default()
        };
        let spec = PodSpec {
            containers: vec![self.container(part, extra)],
            restart_policy: Some(restart.into()),
            termination_grace_period_seconds: Some(GRACE),
            volumes: Some(self.volumes(part)),
            ..PodSpec::default()
        };
        PodTemplateSpec {
            metadata: Some(metadata),
            spec: Some(spec),
        }
    }

    fn container(&self, part: &str, extra: &[&str]) -> Container {
        let listen = format!("telemetry.listen=0.0.0.0:{METRICS_PORT}");
        let words = [part, "/etc/agon/config.toml", "--set", &listen];
        let alive = HTTPGetAction {
            path: Some("/metrics".into()),
            port: IntOrString::Int(METRICS_PORT),
            ..HTTPGetAction::default()
        };
        let mount = |name: &str, path: &str| VolumeMount {
            name: name.into(),
            mount_path: path.into(),
            ..VolumeMount::default()
        };
        let mut mounts = vec![mount("config", "/etc/agon")];
        if part == "learner" {
            mounts.push(mount("run", "/run-dir"));
        }
        Container {
            name: part.into(),
            image: Some(self.arguments.image.clone()),
            args: Some(
                words
                    .iter()
                    .chain(extra)
                    .map(|&word| word.to_owned())
                    .collect(),
            ),
            ports: Some(vec![ContainerPort {
                name: Some("metrics".into()),
                container_port: METRICS_PORT,
                ..ContainerPort::default()
            }]),
            liveness_probe: Some(Probe {
                http_get: Some(alive),
                initial_delay_seconds: Some(30),
                period_seconds: Some(30),
                failure_threshold: Some(5),
                ..Probe::default()
            }),
            volume_mounts: Some(mounts),
            ..Container::default()
        }
    }

    fn volumes(&self, part: &str) -> Vec<Volume> {
        let mut volumes = vec![Volume {
            name: "config".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: format!("{}-config", self.name),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        }];
        if part == "learner" {
            volumes.push(Volume {
                name: "run".into(),
                persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                    claim_name: format!("{}-run", self.name),
                    ..PersistentVolumeClaimVolumeSource::default()
                }),
                ..Volume::default()
            });
        }
        volumes
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
        cluster.list().expect("they can be written")
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
