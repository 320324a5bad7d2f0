package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// serveWebhook ends with ctx.
func serveWebhook(ctx context.Context, dir string) error {
	server := &http.Server{
		Addr:              fmt.Sprintf(":%d", hookPort),
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           http.HandlerFunc(review),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // the process ends anyway
	defer stop()
	err := server.ListenAndServeTLS(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func review(w http.ResponseWriter, r *http.Request) {
	var in admissionv1.AdmissionReview
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Request == nil {
		http.Error(w, "no review", http.StatusBadRequest)
		return
	}
	answer := &admissionv1.AdmissionResponse{UID: in.Request.UID, Allowed: !strings.HasPrefix(in.Request.Name, "refused")}
	if !answer.Allowed {
		answer.Result = &metav1.Status{Message: "the webhook was asked"}
	}
	_ = json.NewEncoder(w).Encode(admissionv1.AdmissionReview{TypeMeta: in.TypeMeta, Response: answer}) // the API server sees it
}
