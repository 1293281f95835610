plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

val onnxruntimeVersion: String by project
val qnnProviderVersion: String by project
val qnnRuntimeVersion: String by project

// The headers of ONNX Runtime are in its AAR, where CMake cannot find them.
val onnxruntimeAar: Configuration by configurations.creating { isTransitive = false }
val onnxruntimeHeaders = layout.buildDirectory.dir("onnxruntime-headers")
val unpackHeaders by tasks.registering(Sync::class) {
    from({ onnxruntimeAar.map { zipTree(it) } }) {
        include("headers/**/*.h")
        eachFile { relativePath = RelativePath(true, "onnxruntime", name) }
        includeEmptyDirs = false
    }
    into(onnxruntimeHeaders)
}

android {
    namespace = "dev.transom.edge"
    compileSdk = 35
    ndkVersion = "27.2.12479018"

    defaultConfig {
        applicationId = "dev.transom.edge"
        minSdk = 29
        targetSdk = 35
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += "arm64-v8a" }
        externalNativeBuild {
            cmake {
                arguments += "-DONNXRUNTIME_HEADERS=${onnxruntimeHeaders.get().asFile}"
            }
        }
    }
    externalNativeBuild {
        cmake {
            path = file("src/main/cpp/CMakeLists.txt")
            version = "3.22.1+"
        }
    }
    packaging {
        // The DSP opens its skeleton as a file, so Android must extract the libraries when it installs the app.
        jniLibs.useLegacyPackaging = true
    }
    buildTypes {
        release { isMinifyEnabled = false }
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
    kotlinOptions { jvmTarget = "17" }
}

tasks.configureEach {
    if (name.startsWith("configureCMake")) dependsOn(unpackHeaders)
}

dependencies {
    onnxruntimeAar("com.microsoft.onnxruntime:onnxruntime-android:$onnxruntimeVersion@aar")
    implementation("com.microsoft.onnxruntime:onnxruntime-android:$onnxruntimeVersion")
    implementation("com.qualcomm.qti:onnxruntime-android-qnn:$qnnProviderVersion")
    implementation("com.qualcomm.qti:qnn-runtime:$qnnRuntimeVersion")
    implementation("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.9.0")
}
